# Open-Sora 1.3, sampling:
#   bash launch/torchrun.sh 8 scripts/diffusion/inference.py configs/opensora-v1-3/inference/t2v.py

# Clips
num_frames = 113
frame_interval = 1
fps = 24
resolution = "720p"
aspect_ratio = "9:16"
multi_resolution = "STDiT2"

# Models
model = dict(
    type="STDiT3-XL/2",
    from_pretrained="PATH/OpenSora-STDiT-v4",
    qk_norm=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
    kernel_size=(8, 8, -1),
    use_spatial_rope=True,
    force_huggingface=True,
)
vae = dict(
    type="OpenSoraVAE_V1_3",
    from_pretrained="PATH/OpenSora-VAE-v1.3",
    z_channels=16,
    micro_batch_size=1,
    micro_batch_size_2d=4,
    micro_frame_size=17,
    use_tiled_conv3d=True,
    tile_size=4,
    normalization="video",
    temporal_overlap=True,
    force_huggingface=True,
)
text_encoder = dict(
    type="t5",
    from_pretrained="PATH/t5-v1_1-xxl",
    model_max_length=300,
)
scheduler = dict(
    type="rflow",
    use_timestep_transform=True,
    num_sampling_steps=30,
    cfg_scale=7.5,
    use_oscillation_guidance=True,
    use_flaw_fix=True,
)

# Run
save_dir = "./samples/samples/"
seed = 42
batch_size = 1
dtype = "bf16"
