# PixArt, sampling:
#   bash launch/torchrun.sh 8 scripts/diffusion/inference.py configs/pixart/inference/16x256x256.py

# Clips
num_frames = 16
fps = 24 // 3
image_size = (256, 256)

# Models
model = dict(
    type="PixArt-XL/2",
    space_scale=0.5,
    time_scale=1.0,
    from_pretrained="PATH/model_ckpt.pt",
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=120,
)
scheduler = dict(
    type="dpm-solver",
    num_sampling_steps=20,
    cfg_scale=7.0,
)

# Run
dtype = "bf16"
batch_size = 2
seed = 42
prompt_path = "./assets/texts/t2v_samples.txt"
save_dir = "./samples/samples/"
