"""A caption with every key, as text and of an image, and prompts resolved from one."""

import json

from cosmos3_jax.io import prompt

SMALL = dict(num_frames=5, height=32, width=32, num_inference_steps=1)
CAPTION = {
    "temporal_caption": "A fox crosses a bridge.",
    "audio_description": "Water.",
    "subjects": [{"description": "A red fox", "number_of_legs": 4, "breed": "Vulpes vulpes"}],
    "background_setting": "A caf\u00e9 by a stream",
    "lighting": {"conditions": "Morning", "direction": "left", "shadows": "long"},
    "aesthetics": {"composition": "thirds", "color_scheme": "blue", "mood_atmosphere": "quiet"},
    "cinematography": {"camera_motion": "Static", "framing": "Wide", "camera_angle": "Eye-level"},
    "style_medium": "Live-action video",
    "artistic_style": "realistic",
    "context": "wildlife",
    "actions": [{"time": "0:00-0:07", "description": "It crosses"}],
    "segments": [{"segment_index": 0, "time_range": "0:00-0:07", "description": "One shot"}],
    "text_renders": [],
    "duration": "7s",
    "fps": 24.0,
    "resolution": {"H": 720, "W": 1280},
    "aspect_ratio": "16,9",
}
TEXT = json.dumps(CAPTION)
RECORD = json.dumps({"prompt": TEXT, "negative_prompt": "blurry"})
IMAGE = {
    key: value
    for key, value in CAPTION.items()
    if key
    not in ("temporal_caption", "audio_description", "actions", "segments", "duration", "fps")
}


def resolve(text, negative=None, *, style="native", num_frames=189, fps=24, **rest):
    size = dict(height=720, width=1280) | rest
    return prompt.resolve_prompts(
        text, negative, style=style, num_frames=num_frames, fps=fps, **size
    )
