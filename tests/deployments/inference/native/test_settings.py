"""Engine settings: sizes of the KV cache, and their twin in ``serve_config.yaml``."""

import pytest

from deployments.config import EngineConfig
from deployments.inference.native.settings import EngineSettings, KvSizes
from deployments.inference.request import ModelRejected


def test_engine_config_has_the_fields_and_defaults_of_settings() -> None:
    assert EngineSettings("base", **EngineConfig().model_dump()) == EngineSettings("base")


def test_settings_rejected_when_longest_sequence_does_not_fit() -> None:
    settings = {"model_path": "", "max_context_tokens": 100, "max_running": 3}
    assert EngineSettings(**settings).kv_sizes(True) == KvSizes(blocks=12, block_tokens=32, context=100)
    assert EngineSettings(**settings, kv_block_tokens=10, kv_blocks=10).kv_sizes(True).blocks_per_sequence == 10
    assert EngineSettings(**settings).kv_sizes(False) == KvSizes(blocks=3, block_tokens=100, context=100)
    with pytest.raises(ModelRejected, match="raise kv_blocks to 10 or more, or lower max_context_tokens"):
        EngineSettings(**settings, kv_block_tokens=10, kv_blocks=9).kv_sizes(True)
    with pytest.raises(ModelRejected, match="kv_blocks must be at least 0"):
        EngineSettings(**settings, kv_blocks=-1)
    with pytest.raises(ModelRejected, match="are for a GPU"):
        EngineSettings(**settings, kv_blocks=10).kv_sizes(False)
