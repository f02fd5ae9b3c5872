"""Imported once by the fork server of harness.py: what each process of a test would compute or import anew."""

from diffusers import AutoencoderKL
from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer, T5EncoderModel

from opensora.planner.meta_model import structure
from tests.dist.problem import MODEL

IMPORTED = (
    AutoencoderKL,
    AutoTokenizer,
    CLIPTextModel,
    CLIPTokenizer,
    T5EncoderModel,
)  # their modules are loaded when asked for
structure(MODEL)  # remembered by whoever is forked; half a second each time otherwise
