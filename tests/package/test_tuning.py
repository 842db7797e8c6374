"""The records of config.py: what sets their fields, and what a measured one replaces."""

import json
import runpy

import pytest
import torch

from mapo_kernels import config

BAD = {
    "LOGIT.tiles": (2, ValueError, r"expected a record among \['ADVANTAGES', .*, got 'LOGIT'"),
    "LOGITS": (2, ValueError, "expected a field among .*, got ''"),
    "LOGITS.tile": (2, ValueError, "LOGITS.tile: expected a field among .*'tiles'.*, got 'tile'"),
    "LOGITS.given": (2, ValueError, "got 'given'"),
    "LOGITS.tiles": ("2", TypeError, "LOGITS.tiles: expected int, got '2'"),
    "LOGITS.steps": (0, ValueError, "LOGITS.steps: expected at least 1, got 0"),
    "LOGITS.backwards": (1, TypeError, "LOGITS.backwards: expected bool, got 1"),
    "HIDDEN.gpu_chunk": (True, TypeError, "HIDDEN.gpu_chunk: expected int, got True"),
}


@pytest.fixture
def unchanged(monkeypatch):
    """The records, as they were before what a test loads."""
    for name in config.RECORDS:
        monkeypatch.setattr(config, name, getattr(config, name))


def written(tmp_path, content):
    path = tmp_path / "tuning.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_file_sets_fields_by_record(unchanged, tmp_path):
    given = {"LOGITS": {"tiles": 2, "first_hint": ""}, "HIDDEN": {"one_product": False}}
    config.load(written(tmp_path, given))
    assert (config.LOGITS.tiles, config.LOGITS.first_hint, config.LOGITS.steps) == (2, "", 4)
    assert config.changed() == {
        "LOGITS.tiles": 2,
        "LOGITS.first_hint": "",
        "HIDDEN.one_product": False,
    }


def test_an_override_ends():
    with config.override({"LOGITS.tiles": 2, "LOGITS.steps": 8, "EAGER.chunk_tokens": 4}):
        assert (config.LOGITS.tiles, config.LOGITS.steps, config.EAGER.chunk_tokens) == (2, 8, 4)
        assert config.LOGITS.given == {"tiles", "steps"}
    assert config.changed() == {} and not config.LOGITS.given


@pytest.mark.parametrize("key", BAD)
def test_what_is_wrong_is_named_and_nothing_is_set(key, unchanged, tmp_path):
    value, error, message = BAD[key]
    good = {"EAGER.chunk_tokens": 4}
    with pytest.raises(error, match=message), config.override(good | {key: value}):
        pass
    record, _, field = key.partition(".")
    path = written(tmp_path, {"EAGER": {"chunk_tokens": 4}, record: {field: value}})
    with pytest.raises(error, match=rf"tuning.json: .*{message.split('.*')[-1]}"):
        config.load(path)
    assert config.changed() == {}


@pytest.mark.parametrize("content", ["", "[1]", '{"LOGITS": 2}', "\x00"])
def test_a_file_of_something_else(content, unchanged, tmp_path):
    with pytest.raises(ValueError, match="tuning.json: "):
        config.load(written(tmp_path, content))
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        config.load(tmp_path / "nowhere.json")


def test_the_environment_names_a_file(monkeypatch, tmp_path):
    path = written(tmp_path, {"LOGITS": {"tiles": 2}})
    monkeypatch.setenv("MAPO_KERNELS_TUNING", str(path))
    assert runpy.run_path(config.__file__)["LOGITS"].tiles == 2
    written(tmp_path, {"LOGITS": {"tiles": "two"}})
    with pytest.raises(TypeError, match=f"{path}: LOGITS.tiles: expected int, got 'two'"):
        runpy.run_path(config.__file__)
    monkeypatch.setenv("MAPO_KERNELS_TUNING", "")
    assert runpy.run_path(config.__file__)["LOGITS"].tiles == 4


def test_a_measured_record_comes_before_defaults_and_after_what_is_given(monkeypatch):
    measured = {"tiles": 2, "max_threads": 256}
    monkeypatch.setattr(config, "TUNED", {("sm_90", 2, 18): measured})
    assert config.LOGITS.tuned("sm_90", 2, 151936).tiles == 2
    assert config.LOGITS.tuned("sm_90", 2, 256000).max_threads == 256
    # Another architecture, another dtype, and half as many columns.
    for key in (("sm_80", 2, 151936), ("sm_90", 4, 151936), ("sm_90", 2, 128256)):
        assert config.LOGITS.tuned(*key) == config.LOGITS
    # The default, when it was asked for.
    with config.override({"LOGITS.tiles": 4}):
        found = config.LOGITS.tuned("sm_90", 2, 151936)
        assert (found.tiles, found.max_threads) == (4, 256)


def test_a_score_and_a_loss_take_the_same_measured_record(monkeypatch):
    pytest.importorskip("triton")
    from mapo_kernels.launch import logits as launch

    monkeypatch.setattr(launch, "architecture", lambda: "a GPU")
    monkeypatch.setattr(launch, "converts_bfloat16", lambda: True)
    monkeypatch.setattr(launch, "warp_size", lambda: 32)
    monkeypatch.setattr(launch, "registers", lambda number: {"maxnreg": number})
    monkeypatch.setattr(config, "TUNED", {("a GPU", 2, 17): {"tiles": 2, "max_threads": 256}})
    launch._tile.cache_clear()
    try:
        x = torch.empty((2, 128256), dtype=torch.bfloat16, device="meta")
        monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: 0)
        loss, scores = launch.tile_of(x)["TILE"], launch.tile_of(x, scores=True)["TILE"]
        assert (loss.number, loss.threads) == (scores.number, scores.threads) == (2, 256)
        assert loss.first_hint == "evict_last" and scores.first_hint == "evict_first"
        assert launch.tile_of(x.float())["TILE"].number == 4
    finally:
        launch._tile.cache_clear()
