"""The count of bytes between devices that the benchmark of scaling reads in a compiled program.

That paper and program agree at tiny sizes is in `test_benchmarks.py`.
"""

import numpy as np
import pytest
import scaling

from cosmos3_jax.cli import bench
from cosmos3_jax.config import Config
from cosmos3_jax.runtime.job import Job

GROUPS = {
    "lists": "replica_groups={{0,1},{2,3}}",
    "iota": "replica_groups=[2,2]<=[4]",
    "mesh, devices in another order": (
        "replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=(0,2,1,3) {'axis_1'}"
    ),
    "mesh": "replica_groups=mesh['axis_0'=2,'axis_1'=2] {'axis_1'}",
}
PROGRAM = """HloModule m

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %a = (bf16[4,8]{{1,0}}, bf16[4,8]{{1,0}}) all-to-all(%x, %y), {groups}, dimensions={{0}}
  %b = ((bf16[4,8]{{1,0}}, bf16[4,8]{{1,0}}), (bf16[4,8]{{1,0}}, bf16[4,8]{{1,0}})) \
all-to-all-start(%x, %y), {groups}
  %c = f32[2,8]{{1,0}} collective-permute(%z), source_target_pairs={{{{0,1}},{{1,0}}}}
}}

ENTRY %main (q: f32[8]) -> f32[16] {{
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, \
backend_config={{"known_trip_count":{{"n":"5"}}}}
  %g = (f32[8]{{0}}, f32[16]{{0}}) all-gather-start(%q), {groups}, dimensions={{0}}
  ROOT %r = f32[16]{{0}} all-reduce(%v), {groups}, to_apply=%add
}}
"""


@pytest.mark.parametrize("groups", GROUPS)
def test_bytes_are_counted_by_kind_as_often_as_a_loop_runs(groups):
    sent = scaling.sent_bytes(PROGRAM.format(groups=GROUPS[groups]), ways=4)
    each = 2 * 4 * 8 * 2 // 2  # two arrays of bfloat16, half of which stays
    assert sent["all-to-all"] == 5 * 2 * each
    assert sent["collective-permute"] == 5 * 2 * 8 * 4
    assert sent["all-gather"] == 16 * 4 // 2
    assert sent["all-reduce"] == 2 * 16 * 4 // 2
    assert sent["reduce-scatter"] == 0


def test_the_count_on_paper():
    """720p on two devices: each sends half of its tokens' queries, keys, values and what they
    become.
    """
    job = Job(num_frames=189, height=720, width=1280, steps=1)
    config = Config().silent()
    request = bench.random_request(config, job)
    tokens, heads = 48 * 23 * 40 // 2, 2 * 32 + 2 * 8
    expected = 36 * 2 * tokens * heads * 128 * 2 // 2
    found = scaling.sent_on_paper(config, request, {"seq": 2}, itemsize=2)
    assert found["all-to-all"] == expected and np.isclose(expected, 16.3e9, rtol=0.01)
    assert scaling.sent_on_paper(config, request, {"cfg": 2}, 2)["all-to-all"] == 0
