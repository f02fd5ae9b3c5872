# Open-Sora 1.1, sampling:
#   bash launch/torchrun.sh 8 scripts/diffusion/inference.py configs/opensora-v1-1/inference/sample-ref.py

# Clips
num_frames = 16
frame_interval = 3
fps = 24
image_size = (240, 426)
multi_resolution = "STDiT2"

# Models
model = dict(
    type="STDiT2-XL/2",
    from_pretrained="hpcai-tech/OpenSora-STDiT-v2-stage3",
    input_sq_size=512,
    qk_norm=True,
    qk_norm_legacy=True,
    enable_flash_attn=True,
    enable_layernorm_kernel=True,
)
vae = dict(
    type="VideoAutoencoderKL",
    from_pretrained="stabilityai/sd-vae-ft-ema",
    cache_dir=None,
    micro_batch_size=4,
)
text_encoder = dict(
    type="t5",
    from_pretrained="DeepFloyd/t5-v1_1-xxl",
    cache_dir=None,
    model_max_length=200,
)
scheduler = dict(
    type="iddpm",
    num_sampling_steps=100,
    cfg_scale=7.0,
    cfg_channel=3,
)

# Run
prompt_path = None
prompt = [
    'TEXT{"reference_path": "assets/images/condition/cliff.png", "mask_strategy": "0"}',
    'TEXT{"reference_path": "assets/images/condition/sunset1.png","mask_strategy": "0"}',
    'TEXT{"reference_path": "https://cdn.openai.com/tmp/s/interp/d0.mp4","mask_strategy": "0,0,-8,0,8"}',
    (
        'TEXT{"reference_path": "https://cdn.pixabay.com/video/2021/04/25/72171-542991404_large.mp4",'
        '"mask_strategy": "0,0,0,0,15,0.8"}'
    ),
    (
        'TEXT{"reference_path": "assets/images/condition/sunset1.png;assets/images/condition/sunset2.png",'
        '"mask_strategy": "0;0,1,0,-1,1"}'
    ),
    'TEXT{"reference_path": "https://cdn.openai.com/tmp/s/interp/d0.mp4", "mask_strategy": "0,0,0,0,15"}',
]
loop = 2
condition_frame_length = 4
dtype = "bf16"
batch_size = 1
seed = 42
save_dir = "./samples/samples/"
