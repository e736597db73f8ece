"""The configuration: presets are sound, mistakes are one sentence before anything is built."""

import json
from pathlib import Path
from typing import Any

import pytest

from simclr_dali.model.resnet import ResNet
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.remote import open_split
from simclr_dali.shards.errors import UserError
from simclr_dali.train.config import Config, LARSParams
from simclr_dali.train.config_file import PRESETS, load_config
from simclr_dali.train.simclr_block import Graph

MINIMAL: dict[str, Any] = {
    "train_batch_size": 64,
    "optimizer": {"type": "LARS", "params": {"lr": 0.075}},
    "simclr": {"data": "d", "lanes": 8},
}


def written(tmp_path: Path, config: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(config if isinstance(config, str) else json.dumps(config))
    return str(path)


@pytest.mark.parametrize("preset", sorted(path.name for path in PRESETS.glob("*.json")))
def test_presets_are_valid_and_say_what_they_are(preset: str) -> None:
    about = load_config(preset, [], data="somewhere").simclr.about
    assert all(vars(about).values())
    assert f"--config {preset}" in about.command or about.command == "scripts/quickstart.sh"


@pytest.mark.parametrize(
    ("preset", "batch", "epochs", "lr", "temperature"),
    [
        ("ds_lars.json", 4096, 200, 4.8, 0.1),
        ("ds_lars_100e.json", 4096, 100, 4.8, 0.1),
        ("ds_lars_800e.json", 4096, 800, 4.8, 0.1),
        ("ds_sqrt_b256.json", 256, 100, 1.2, 0.1),
        ("cifar10.json", 512, 1000, 2.0, 0.5),
    ],
)
def test_presets_hold_the_published_settings(
    preset: str, batch: int, epochs: int, lr: float, temperature: float
) -> None:
    config = load_config(preset, [], data="somewhere")
    assert (config.train_batch_size, config.simclr.epochs) == (batch, epochs)
    assert (config.optimizer.params.lr, config.simclr.temperature) == (lr, temperature)
    assert config.simclr.warmup_epochs == 10


def test_cifar10_has_no_blur_weaker_color_and_the_small_stem() -> None:
    config = load_config("cifar10.json", [], data="somewhere")
    assert config.simclr.views.recipes()[0] == Recipe(blur=0.0, strength=0.5)
    assert config.architecture().encoder == ResNet("resnet18", 1.0, "3x3")


def test_ds_lars_is_the_papers_recipe() -> None:
    config = load_config("ds_lars.json", [])
    simclr, params = config.simclr, config.optimizer.params
    assert isinstance(params, LARSParams)
    assert config.train_batch_size == 4096
    assert (params.lr, params.momentum, params.weight_decay, params.trust_coefficient) == (4.8, 0.9, 1e-6, 0.001)
    assert (simclr.temperature, simclr.epochs, simclr.warmup_epochs, simclr.image_size) == (0.1, 200, 10, 224)
    assert simclr.encoder.name == "resnet50" and simclr.encoder.projector == [2048, 128]
    assert simclr.views.recipes() == (Recipe(), Recipe())


@pytest.mark.parametrize(("world", "micro"), [(1, 256), (4, 256), (8, 256), (16, 256), (32, 128), (64, 64)])
def test_the_global_batch_is_the_same_on_any_number_of_gpus(world: int, micro: int) -> None:
    config = load_config("ds_lars.json", [])
    assert config.local_batch(world) * world == 4096
    assert config.micro_batch(world) == micro


def test_a_share_without_a_fitting_micro_batch_is_refused(tmp_path: Path) -> None:
    overrides = ["train_batch_size=254", "simclr.lanes=2", "train_micro_batch_size_per_gpu=64", "simclr.lr_rule=none"]
    config = load_config(written(tmp_path, MINIMAL), overrides)
    with pytest.raises(UserError, match=r"127 images.*64.*largest is 1"):
        config.micro_batch(2)


def test_a_file_in_the_working_folder_wins_over_a_preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ds_lars.json").write_text(json.dumps(MINIMAL))
    monkeypatch.chdir(tmp_path)
    assert load_config("ds_lars.json", []).train_batch_size == 64


def test_overrides_and_defaults(tmp_path: Path) -> None:
    name = written(tmp_path, MINIMAL)
    config = load_config(name, ["simclr.epochs=17", "simclr.views.blur=0.25", "simclr.encoder.name=resnet18"], run="r")
    assert (config.simclr.epochs, config.simclr.views.blur, config.simclr.encoder.name) == (17, 0.25, "resnet18")
    assert config.simclr.run == "r" and load_config(name, []).simclr.run == "runs/mine"
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_stem_follows_the_size_of_the_views(tmp_path: Path) -> None:
    name = written(tmp_path, MINIMAL)
    for words, stem in (([32], "3x3"), ([224], "7x7"), ([32, "simclr.encoder.stem=7x7"], "7x7")):
        size, *rest = words
        encoder = load_config(name, [f"simclr.image_size={size}", *map(str, rest)]).architecture().encoder
        assert isinstance(encoder, ResNet) and encoder.stem == stem


def test_the_graph_is_what_a_device_likes_unless_a_config_says_otherwise() -> None:
    assert Graph().on("cuda") == {"conditionals": False, "region": True, "prefetch": 4}
    assert Graph().on("cpu") == {"conditionals": True, "region": False, "prefetch": 2}
    given = {"conditionals": True, "region": False, "prefetch": 1}
    assert Graph.model_validate(given).on("cuda") == given


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("simclr.epoch=7", ["unknown key 'simclr.epoch'"]),
        ("train_batchsize=7", ["unknown key 'train_batchsize'"]),
        ("fp16.enabled=true", ["fp16", "torch_autocast"]),
        ("bf16.enabled=true", ["bf16", "torch_autocast"]),
        ("simclr.epochs=2.5", ["simclr.epochs is 2.5"]),
        ("simclr.epochs=many", ["simclr.epochs is 'many'"]),
        ("simclr.batchnorm_group=0", ["simclr.batchnorm_group is 0", "'all' or 'node' or greater than"]),
        ('simclr.track=["x"]', ["simclr.track is ['x']", "'auto' or 'tensorboard'"]),
        ("simclr.epochs=0", ["simclr.epochs is 0"]),
        ("simclr.temperature=0.001", ["simclr.temperature is 0.001"]),
        ("simclr.encoder.name=resnet20", ["resnet20", "resnet50"]),
        ("simclr.encoder.width=0.3", ["simclr.encoder.width is 0.3"]),
        ("simclr.encoder.width=wide", ["simclr.encoder.width is 'wide': input should be"]),
        ("simclr.encoder.width=1e300", ["simclr.encoder.width is 1e+300"]),
        ("simclr.encoder=null", ["simclr.encoder is None"]),
        ("simclr.encoder.depth=18", ["simclr.encoder.resnet50 has no 'depth'", "stem"]),
        ("simclr.encoder.stem=5x5", ["simclr.encoder.stem is '5x5'"]),
        ("simclr.ring=true", ["simclr.ring is True", "remove it"]),
        ("communication_data_type=fp16", ["communication_data_type is 'fp16'", "'fp32'"]),
        ("torch_autocast.dtype=float16", ["torch_autocast.dtype is 'float16'"]),
        ("simclr.views.solarize=2", ["simclr.views.solarize is 2"]),
        ("simclr.views.second.sigma=[2,1]", ["simclr.views.second.sigma", "2.0, 1.0"]),
        ("simclr.lanes=7", ["lanes is 7", "64"]),
        ("simclr.views.area=[0.5,0.1]", ["simclr.views.area", "0.1"]),
        ("simclr.views.area=[0.5,2]", ["simclr.views.area", "2"]),
        ("simclr.views.blur=1.5", ["simclr.views.blur is 1.5"]),
        ("simclr.warmup_epochs=300", ["warmup_epochs is 300"]),
        ("gradient_clipping=1.0", ["gradient_clipping is 1.0"]),
        ("zero_optimization.stage=2", ["stage is 2", "LARS"]),
        ("optimizer.type=Adam", ["optimizer.type is 'Adam'", "AdamW"]),
        ("optimizer.type=AdamW", ["lr_rule", "AdamW", "none"]),
        ("optimizer.params.lr=0.3", ["lr is 0.3", "linear", "0.075"]),
        ("optimizer.params.lr=-1", ["optimizer.params.lr is -1"]),
        ("optimizer.params.nesterov=true", ["unknown key 'optimizer.params.nesterov'"]),
        ("simclr.graph.region=maybe", ["simclr.graph.region is 'maybe'", "'auto'"]),
        ("simclr.graph.prefetch=-1", ["simclr.graph.prefetch is -1"]),
        ("simclr.compile=yes", ["simclr.compile is 'yes'", "inductor"]),
        ("train_batch_size=1", ["train_batch_size is 1"]),
        ("simclr.epochs", ["no '='"]),
        ("train_batch_size.x=1", ["train_batch_size.x=1"]),
        ("simclr=3", ["simclr is 3"]),
        ("simclr.run={}", ["simclr.run"]),
        ("simclr.temperature=1e999", ["simclr.temperature"]),
        ("simclr.cache_gb=Infinity", ["simclr.cache_gb"]),
        ("train_batch_size=" + "9" * 400, ["train_batch_size"]),
        ("simclr.epochs=" + "9" * 5000, ["simclr.epochs"]),
    ],
)
def test_mistakes_are_named(override: str, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path, MINIMAL), [override])
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("rule", "lr"), [("linear", 0.3 * 512 / 256), ("sqrt", 0.075 * 512**0.5)])
def test_an_automatic_rate_follows_the_batch(rule: str, lr: float, tmp_path: Path) -> None:
    overrides = ["optimizer.params.lr=auto", "train_batch_size=512", f"simclr.lr_rule={rule}"]
    config = load_config(written(tmp_path, MINIMAL), overrides)
    assert config.optimizer.params.lr == lr
    with pytest.raises(UserError, match=r"'auto'.*'none'"):
        load_config(written(tmp_path, MINIMAL), ["optimizer.params.lr=auto", "simclr.lr_rule=none"])


@pytest.mark.parametrize("rule", ["[]", "{}", "3", "null"])
@pytest.mark.parametrize("batch", ["-4", "0", "true", "9" * 400])
def test_an_automatic_rate_with_nonsense_around_it_is_one_sentence(rule: str, batch: str, tmp_path: Path) -> None:
    overrides = ["optimizer.params.lr=auto", f"train_batch_size={batch}", f"simclr.lr_rule={rule}"]
    with pytest.raises(UserError):
        load_config(written(tmp_path, MINIMAL), overrides)


def test_data_and_run_of_the_command_line_win_over_a_whole_block(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL), ['simclr={"lanes": 4}'], data="x", run="y")
    assert (config.simclr.lanes, config.simclr.data, config.simclr.run) == (4, "x", "y")


def test_what_no_optimizer_or_encoder_can_do_is_refused(tmp_path: Path) -> None:
    sgd = ["optimizer.type=SGD", "optimizer.params.nesterov=true", "optimizer.params.momentum=0.0"]
    with pytest.raises(UserError, match="nesterov"):
        load_config(written(tmp_path, MINIMAL), sgd)
    thin = ["simclr.encoder.selective_kernels=true", "simclr.encoder.width=0.015625"]
    with pytest.raises(UserError, match="1/32"):
        load_config(written(tmp_path, MINIMAL), thin)
    cache = load_config(written(tmp_path, MINIMAL), ["simclr.cache=~nosuchuser/x"]).shard_cache()
    with pytest.raises(UserError, match="nosuchuser"):
        open_split("http://127.0.0.1:9/x", "train", cache)


def test_selective_kernels_need_bottlenecks(tmp_path: Path) -> None:
    name = written(tmp_path, MINIMAL)
    encoder = load_config(name, ["simclr.encoder.selective_kernels=true"]).architecture().encoder
    assert isinstance(encoder, ResNet) and encoder.selective_kernels
    with pytest.raises(UserError, match=r"selective_kernels.*resnet18"):
        load_config(name, ["simclr.encoder.selective_kernels=true", "simclr.encoder.name=resnet18"])


@pytest.mark.parametrize("name", ["lars", "Sgd", "adamw"])
def test_optimizers_go_by_any_case(name: str, tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MINIMAL), [f"optimizer.type={name}", "simclr.lr_rule=none"])
    assert config.optimizer.type.lower() == name.lower()


def test_a_forced_rate_is_allowed(tmp_path: Path) -> None:
    overrides = ["optimizer.params.lr=0.3", "simclr.lr_rule=none"]
    assert load_config(written(tmp_path, MINIMAL), overrides).optimizer.params.lr == 0.3


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ("{", "not JSON"),
        ("[]", "JSON object"),
        ({**MINIMAL, "simclr": 3}, "simclr is 3"),
        ('{"simclr": {}, "simclr": {}}', "'simclr' stands twice"),
        ("[" * 100_000, "not JSON"),
        ({"simclr": {}}, "train_batch_size"),
        ({**MINIMAL, "simclr": {"lanes": 8}}, "--data"),
    ],
)
def test_unusable_files_are_named(config: Any, word: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=word):
        load_config(written(tmp_path, config), [])


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "latin.json").write_bytes(b'{"\xe9": 1}')
    with pytest.raises(UserError, match=r"latin\.json cannot be read"):
        load_config(str(tmp_path / "latin.json"), [])
    with pytest.raises(UserError, match="cannot be read"):
        load_config("x" * 5000, [])


def test_a_missing_config_lists_the_presets() -> None:
    with pytest.raises(UserError, match=r"nothing\.json.*ds_lars\.json"):
        load_config("nothing.json", [])


def test_processes_must_divide_the_lanes() -> None:
    with pytest.raises(UserError, match="3 processes do not divide the 64 lanes"):
        load_config("ds_lars.json", []).local_batch(3)


def test_the_second_view_inherits_what_it_does_not_override() -> None:
    config = load_config("ds_lars.json", ["simclr.views.strength=0.5", "simclr.views.second.blur=0.1"], data="d")
    first, second = config.simclr.views.recipes()
    assert (first.strength, first.blur) == (0.5, 0.5)
    assert second == first.model_copy(update={"blur": 0.1})
    same = load_config("ds_lars.json", [], data="d").simclr.views.recipes()
    assert same[0] == same[1] == Recipe()
    with pytest.raises(UserError, match=r"views\.second\.area"):
        load_config("ds_lars.json", ["simclr.views.second.area=[0.5, 0.1]"], data="d")


def test_a_config_says_only_what_differs_from_its_base(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text(
        json.dumps({"base": "ds_lars.json", "simclr": {"epochs": 50, "views": {"blur": 0.0}}})
    )
    (tmp_path / "mine.json").write_text(json.dumps({"base": "half.json", "simclr": {"data": "d", "seed": 3}}))
    mine, base = load_config(str(tmp_path / "mine.json"), []), load_config("ds_lars.json", [])
    assert (mine.simclr.epochs, mine.simclr.seed, mine.simclr.views.blur, mine.simclr.run) == (50, 3, 0.0, "runs/mine")
    assert mine.train_batch_size == base.train_batch_size and mine.simclr.views.sigma == base.simclr.views.sigma
    (tmp_path / "half.json").write_text(json.dumps({"base": "mine.json"}))
    with pytest.raises(UserError, match="its own base"):
        load_config(str(tmp_path / "mine.json"), [])
    with pytest.raises(UserError, match="base is 3"):
        load_config(written(tmp_path, {**MINIMAL, "base": 3}), [])


def test_what_deepspeed_must_be_told_may_stand_in_a_config_and_changes_nothing(tmp_path: Path) -> None:
    constants = {
        "gradient_clipping": 0,
        "zero_optimization": {"stage": 0},
        "communication_data_type": "fp32",
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    }
    plain = load_config(written(tmp_path, MINIMAL), [])
    assert load_config(written(tmp_path, {**MINIMAL, **constants}), []) == plain
    with pytest.raises(UserError, match=r"unknown key 'zero_optimization"):
        load_config(written(tmp_path, {**MINIMAL, "zero_optimization": {"stage": 0, "overlap_comm": True}}), [])
