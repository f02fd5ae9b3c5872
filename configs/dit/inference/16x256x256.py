# DiT, sampling:
#   bash launch/torchrun.sh 8 scripts/diffusion/inference.py configs/dit/inference/16x256x256.py

# Clips
num_frames = 16
fps = 24 // 3
image_size = (256, 256)

# Models
model = dict(
    type="DiT-XL/2",
    condition="text",
    from_pretrained="PRETRAINED_MODEL",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="clip",
    from_pretrained="openai/clip-vit-base-patch32",
    model_max_length=77,
)
scheduler = dict(
    type="dpm-solver",
    num_sampling_steps=20,
    cfg_scale=4.0,
)

# Run
dtype = "bf16"
batch_size = 2
seed = 42
prompt_path = "./assets/texts/ucf101_labels.txt"
save_dir = "./samples/samples/"
