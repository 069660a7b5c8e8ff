"""Parts of a model and stages of a generation, in a user's words."""

PARTS = {
    "und": "text tower",
    "gen": "media tower",
    "video_vae": "video VAE",
    "sound_vae": "sound VAE",
}
STAGES = {
    "video encode": "encoding the input",
    "condition": "encoding the prompt",
    "denoise": "denoising",
    "video decode": "decoding the video",
    "sound decode": "decoding the sound",
}
