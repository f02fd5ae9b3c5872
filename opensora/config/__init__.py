"""The configuration of a run or of a sampling job: what it may say, how it is read and written.

The names that scripts and notebooks need are here; ours come from where they live.
"""

from opensora.config.load import load_config, save, to_omegaconf, to_yaml
from opensora.config.run import RunConfig, SampleConfig

__all__ = ["RunConfig", "SampleConfig", "load_config", "save", "to_omegaconf", "to_yaml"]
