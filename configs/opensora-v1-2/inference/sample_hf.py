# Open-Sora 1.2, sampling:
#   bash launch/torchrun.sh 8 scripts/diffusion/inference.py configs/opensora-v1-2/inference/sample_hf.py

# Clips
num_frames = 51
frame_interval = 1
fps = 24
save_fps = 24
resolution = "240p"
aspect_ratio = "9:16"
multi_resolution = "STDiT2"

# Models
model = dict(
    type="STDiT3-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v3",
    qk_norm=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
    force_huggingface=True,
)
vae = dict(
    type="OpenSoraVAE_V1_2",
    from_pretrained="hpcai-tech/OpenSora-VAE-v1.2",
    micro_frame_size=17,
    micro_batch_size=4,
    force_huggingface=True,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    num_sampling_steps=30,
    cfg_scale=7.0,
)

# Run
save_dir = "./samples/samples/"
seed = 42
batch_size = 1
dtype = "bf16"
condition_frame_length = 5
align = 5
aes = 6.5
flow = None
