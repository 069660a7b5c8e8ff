"""What a record may hold: each field is checked, and a folder that it names is not read."""

import argparse
import json

import jax
import pytest

from cosmos3_jax.cli.generate import recorded_mesh
from cosmos3_jax.cli.record import recorded_options, sampled_only
from cosmos3_jax.cli.record_check import parse_record


@pytest.mark.parametrize(
    "name, values",
    {
        "prompt": [None, 5, ["a"], {}],
        "seed": [None, [], True, 1.5, 10**400],
        "sigmas": [[], "", {}, [0.9, None], [10**400, 0]],
        "num_frames": [[], "9", 10**400],
        "fps": [[], 10**400, None],
        "guidance_scale": [{}, 10**400],
        "negative_prompt": [5, {"path": 1}],
        "system_prompt": [True, []],
        "prompt_metadata": [1, "yes"],
        "image": [{"path": ".."}, {"path": "/"}, {"path": ""}, {"path": 3}, "a.png"],
        "noise": [".", "a\0b", 3],
        "lora": [[{"path": "..", "factor": 1}], [{"path": "a"}], {}, [{"path": "a", "factor": ""}]],
        "checkpoint": ["..", "", 5, "/"],
        "checkpoint_files": [None, [], {"files": []}, {"files": {"a": 1}}],
        "versions": [None, [], {"jax": 3}],
        "dtype": ["x", 5, "int8"],
        "steps_per_program": [[], None],
        "mesh": [[], {"cfg": "2"}],
    }.items(),
)  # fmt: skip
def test_a_field_that_no_record_holds_is_named(name, values):
    record = {"prompt": "a", "seed": 1, "sigmas": [0.9, 0.0]}
    assert parse_record(json.dumps(record), "here") == record
    for value in values:
        with pytest.raises(ValueError, match=f"here: the record in it is damaged: {name}="):
            parse_record(json.dumps(record | {name: value}), "here")


@pytest.mark.parametrize("text", ["[" * 100_000, "{", "[]", '{"prompt": "a"}', ""])
def test_a_text_that_is_no_record(text):
    with pytest.raises(ValueError, match="here: there is no record in it"):
        parse_record(text, "here")


def test_a_folder_is_no_input_of_a_record(tmp_path):
    """It would be read whole, whatever it is."""
    (tmp_path / "photos").mkdir()
    record = {"prompt": "a", "seed": 1, "sigmas": [0.9, 0.0]}
    for field in ({"image": {"path": "photos"}}, {"lora": [{"path": "photos", "factor": 1.0}]}):
        (tmp_path / "r.json").write_text(json.dumps(record | {"checkpoint": "tiny"} | field))
        with pytest.raises(ValueError, match="photos is neither there nor beside the record"):
            recorded_options(tmp_path / "r.json", {})


def test_weights_that_were_sampled_are_named(capsys):
    files = {name: {"bytes": 1, "sampled": "a"} for name in "xy"}
    files["y"]["sha256"] = files["z"] = {"bytes": 1, "sha256": "b"}
    record = {"checkpoint_files": {"files": files}}
    assert sampled_only(record, record) == ["x"]


@pytest.mark.parametrize(
    ("sizes", "devices", "mesh"),
    [
        ({"cfg": 2, "seq": 2}, 4, "cfg=2,seq=2"),
        ({"seq": 2}, 4, "seq=2"),
        ({}, 4, "data=1"),
        ({"seq": 8}, 4, None),
        ({"idle": 2, "seq": 2}, 4, None),
        (None, 4, None),
    ],
)
def test_the_recorded_mesh_where_there_are_devices(monkeypatch, sizes, devices, mesh):
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    assert recorded_mesh(argparse.Namespace(recorded_mesh=sizes)) == mesh
