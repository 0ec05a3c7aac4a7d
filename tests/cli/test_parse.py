"""Flags, YAML and presets become one config; unknown keys are refused with a suggestion."""

import pytest
import yaml
from pinned import case

from metric_kd.cli.config import TrainConfig, default_save_dir, to_dict, with_rate
from metric_kd.cli.losses import fold
from metric_kd.cli.making import make_settings
from metric_kd.cli.parse import parse, presets
from metric_kd.errors import UserError

TEACHER = "--mode train --dataset cub200 --base resnet50 --sample distance --margin 0.2 --embedding_size 512 --save_dir teacher"
STUDENT = (
    "--dataset cub200 --base resnet18 --embedding_size 64 --l2normalize false --teacher_base resnet50 "
    "--teacher_embedding_size 512 --teacher_load teacher/best.pth --dist_ratio 1 --angle_ratio 2 --save_dir student"
)


def test_the_seeds_teacher_command_and_defaults():
    config = parse("train", TEACHER.split()).config
    assert (config.sample, config.margin, config.embedding_size, config.base) == ("distance", 0.2, 512, "resnet50")
    assert (config.lr, config.batch, config.num_image_per_class) == (1e-5, 64, 5)
    assert (config.lr_decay_epochs, config.lr_decay_gamma) == ([25, 30, 35], 0.5)
    assert (config.epochs, config.iter_per_epoch, config.recall, config.seed) == (40, None, [1], 0)
    assert parse("train", []).config.dataset == "cub200"
    assert fold(config).loss == ["l2_triplet:1,margin=0.2,sample=distance"]


def test_the_seeds_student_command_and_defaults():
    config = fold(parse("distill", STUDENT.split()).config)
    assert config.l2normalize is False and config.teacher_l2normalize is True
    assert (config.lr, config.epochs, config.lr_decay_epochs, config.lr_decay_gamma) == (1e-4, 80, [40, 60], 0.1)
    assert config.loss == ["rkd_distance:1", "rkd_angle:2"]
    assert fold(config).loss == config.loss, "folding twice must not double the losses"


def test_ratio_flags_are_spellings_of_loss():
    flags = [
        "--triplet_ratio",
        "1",
        "--triplet_margin",
        "0.3",
        "--dark_ratio",
        "2",
        "--dark_alpha",
        "4",
        "--at_ratio",
        "3",
        "--fitnet_ratio",
        "5",
    ]
    assert fold(parse("distill", flags).config).loss == [
        "l2_triplet:1,margin=0.3,sample=distance",
        "dark_rank:2,alpha=4,beta=3",
        "at:3,reduction=sum",
        "fitnet:5",
    ]


def test_lists_are_space_separated_and_both_spellings_work():
    config = parse(
        "train", ["--lr-decay-epochs", "3", "4", "5", "--recall", "1", "2", "4", "8", "--save-dir", "a-b"]
    ).config
    assert (config.lr_decay_epochs, config.recall, config.save_dir) == ([3, 4, 5], [1, 2, 4, 8], "a-b")


@pytest.mark.parametrize(
    "flag, hint", [("--lr_decay_epoch", "--lr_decay_epochs"), ("--bach", "--batch"), ("--lr_d", "")]
)
def test_no_abbreviations_and_unknown_flags_get_a_suggestion(flag, hint):
    with pytest.raises(UserError, match="unknown flag") as error:
        parse("train", [flag, "3"])
    assert hint in str(error.value)


@pytest.mark.parametrize(
    "flags, word", [("--lr fast", "--lr"), ("--optimizer adamx", "--optimizer"), ("--recall one", "--recall")]
)
def test_wrong_values_name_the_flag_in_one_line(flags, word):
    with pytest.raises(UserError) as error:
        parse("train", flags.split())
    assert word in str(error.value) and "\n" not in str(error.value)


def test_yaml_then_flags_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 1e-3\nlr-decay-epochs: [7]\nloss:\n- {name: contrastive, weight: 2, margin: 0.5}\n")
    parsed = parse("train", ["--config", str(file)])
    assert (parsed.config.lr, parsed.config.lr_decay_epochs) == (1e-3, [7])
    assert fold(parsed.config).loss == ["contrastive:2,margin=0.5,sample=all"]
    assert {"lr", "lr_decay_epochs", "loss"} <= parsed.given
    config = parse("train", ["--config", str(file), "--lr", "5", "--loss", "l1_triplet:1"]).config
    assert (config.lr, config.loss) == (5.0, ["l1_triplet:1"])


def test_yaml_errors(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1\n")
    with pytest.raises(UserError, match="unknown key"):
        parse("train", ["--config", str(file)])
    file.write_text("emedding_size: 1\n")
    with pytest.raises(UserError, match="did you mean 'embedding_size'"):
        parse("train", ["--config", str(file)])
    file.write_text("a: [\n")
    with pytest.raises(UserError, match="no valid YAML"):
        parse("train", ["--config", str(file)])
    with pytest.raises(UserError, match="does not exist"):
        parse("train", ["--config", str(tmp_path / "none.yaml")])


def test_presets_are_complete_recipes():
    assert {"rkd2019", "rkd2019_teacher"} <= set(presets())
    config = fold(parse("distill", ["--preset", "rkd2019", "--embedding_size", "64"]).config)
    assert (config.l2normalize, config.batch, config.loss) == (False, 128, ["rkd_distance:1", "rkd_angle:2"])
    assert config.embedding_size == 64
    with pytest.raises(UserError, match="did you mean"):
        parse("distill", ["--preset", "rkd2018"])


@pytest.mark.parametrize(
    "spec, message",
    [
        ("rkd_distanc:1", "did you mean 'rkd_distance'"),
        ("l2_triplet:1,margn=2", "did you mean 'margin'"),
        ("l2_triplet:1,margin", "option=value"),
        ("rkd_angle:1,beta=2", "takes no options"),
        ("l2_triplet:x", "finite number"),
        ("l2_triplet:[1", "finite number"),
        ("l2_triplet:nan", "finite number"),
        ("l2_triplet:1,sample=[", "unknown sampler"),
        ("l2_triplet:1,margin=null", "needs a value"),
        ("l2_triplet:1,sample=hrd", "did you mean 'hard'"),
        ("l2_triplet:1,margin=wide", "is a number"),
    ],
)
def test_losses_are_checked(spec, message):
    with pytest.raises(UserError, match=message):
        fold(parse("train", ["--loss", spec]).config)


def test_distilling_needs_something_to_learn_from():
    with pytest.raises(UserError, match="nothing to learn from"):
        fold(parse("distill", []).config)


def test_default_save_dir_depends_on_the_config_but_not_on_what_resuming_may_change():
    one, other = TrainConfig(lr=1.0), TrainConfig(lr=2.0)
    assert default_save_dir("train", one) != default_save_dir("train", other)
    assert default_save_dir("train", one) == default_save_dir("train", TrainConfig(lr=1.0, epochs=99, workers=4))
    assert default_save_dir("train", one).startswith("runs/train-cub200-resnet50-")


def test_help_shows_underscores_and_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse("distill", ["--help"])
    text = capsys.readouterr().out
    assert "--lr_decay_epochs" in text and "--lr-decay-epochs" not in text and "--teacher_load" in text


@pytest.mark.parametrize(
    "line, word",
    [
        ("optimizer: adamx", "--optimizer"),
        ("freeze_bn: maybe", "--freeze_bn"),
        ("l2normalize: nope", "--l2normalize"),
        ("batch: twelve", "--batch"),
        ("epochs: null", "epochs is null"),
        ("lr: [1, 2]", "lr takes one value"),
        ("seed: abc", "--seed"),
        ("lr_decay_epochs: null", "lr_decay_epochs is null"),
        ("recall: x", "--recall"),
        ("loss: [{weight: 1}]", "a map with a name"),
        ("input_size: big", "--input_size"),
    ],
)
def test_values_in_yaml_are_checked_like_flags(line, word, tmp_path):
    (tmp_path / "c.yaml").write_text(line)
    with pytest.raises(UserError, match=word):
        parse("train", ["--config", str(tmp_path / "c.yaml")])


def test_natural_yaml_is_understood(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "train_classes: 4\npretrained: false\nrecall: 2\nlr_decay_epochs: []\nplugins: a.py\nload: null\nfreeze_bn: true\n"
        "loss: l1_triplet:1\n"
    )
    config = parse("train", ["--config", str(tmp_path / "c.yaml")]).config
    assert (config.train_classes, config.pretrained, config.recall, config.lr_decay_epochs) == ("4", "false", [2], [])
    assert (config.plugins, config.load, config.freeze_bn, config.loss) == (["a.py"], None, True, ["l1_triplet:1"])


def test_a_bare_boolean_flag_means_true():
    config = parse("train", ["--dry_run", "--freeze-bn", "--deterministic", "false", "--skip_unreadable"]).config
    assert (config.dry_run, config.freeze_bn, config.deterministic, config.skip_unreadable) == (True, True, False, True)


def test_weights_and_options_survive_the_saved_spelling():
    text = fold(parse("train", ["--loss", "l2_triplet:0.123456789,margin=1e-1"]).config).loss
    assert text == ["l2_triplet:0.123456789,margin=0.1,sample=all"]
    assert fold(parse("train", ["--loss", "cross_entropy:1,scale=null"]).config).loss == ["cross_entropy:1,scale=null"]
    assert fold(parse("train", ["--loss", "cross_entropy:1,scale=1e1"]).config).loss == ["cross_entropy:1,scale=10"]


def test_another_load_makes_what_a_file_says_of_its_network_no_contradiction(tmp_path):
    (tmp_path / "c.yaml").write_text("teacher_base: resnet14\nteacher_load: a\nbatch: 12\n")
    given = parse("distill", ["--config", str(tmp_path / "c.yaml")]).given
    assert {"teacher_base", "batch"} <= given
    given = parse("distill", ["--config", str(tmp_path / "c.yaml"), "--teacher_load", "b"]).given
    assert "teacher_base" not in given and "batch" in given


def test_margins_of_other_losses_are_their_own():
    """--margin and --triplet_margin belong to triplets; a loss that calls something else a margin keeps its default."""
    losses = fold(
        parse("distill", ["--loss", "cross_entropy:1", "--loss", "ab:10", "--loss", "l2_triplet:1"]).config
    ).loss
    assert losses == ["cross_entropy:1", "ab:10", "l2_triplet:1,margin=0.2,sample=distance"]


def test_a_classification_starts_from_preset_zoo_and_flags_win():
    config = parse("train", ["--task", "classification"]).config
    assert (config.optimizer, config.lr, config.epochs, config.batch) == ("sgd", 0.1, 200, 128)
    assert (config.lr_decay_at, config.weight_decay) == ([0.5, 0.75], 1e-4)
    config = parse("train", ["--task", "classification", "--lr_decay_epochs", "3", "--lr", "0.5"]).config
    assert (config.lr_decay_at, config.lr_decay_epochs, config.lr) == (None, [3], 0.5)
    assert parse("train", []).config.optimizer == "adam"


def test_milestones_scale_with_epochs():
    """Epochs 1..100 at the full rate, 101..150 at a tenth, then a hundredth (the Zoo); the same shares of 20 epochs."""
    from metric_kd.cli.making import make_settings
    from metric_kd.engine.optimisation import learning_rate

    config = parse("train", ["--preset", "zoo"]).config
    settings = make_settings(config, 10)
    rates = [learning_rate(settings, epoch, 0) for epoch in range(1, 201)]
    pinned = case("zoo_lr_main", family="zoo").outputs["lr"]
    assert rates == pytest.approx(pinned.tolist())
    short = make_settings(parse("train", ["--preset", "zoo", "--epochs", "20"]).config, 10)
    assert [learning_rate(short, epoch, 0) for epoch in range(1, 21)] == pytest.approx(pinned[9::10].tolist())


def test_a_stage_follows_the_zoos_own_schedule():
    from metric_kd.cli.making import make_settings
    from metric_kd.engine.optimisation import learning_rate, stage_settings
    from metric_kd.losses.term import TERMS

    (stage,) = TERMS["ab"]().stages()
    settings = stage_settings(make_settings(parse("train", ["--preset", "zoo"]).config, 10), stage)
    pinned = case("zoo_lr_init", family="zoo").outputs["lr"]
    assert settings.epochs == len(pinned) == 50
    assert [learning_rate(settings, epoch, 0) for epoch in range(1, 51)] == pytest.approx(pinned.tolist())


def test_milestones_by_number_win_over_shares_that_lie_below_them(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("task: classification\nlr_decay_epochs: [3]\n")
    for arguments in (["--config", str(file)], ["--preset", "zoo", "--config", str(file)]):
        config = parse("train", arguments).config
        assert (config.lr_decay_at, config.lr_decay_epochs) == (None, [3])
    file.write_text("task: classification\nlr_decay_epochs: [3]\nlr_decay_at: [0.5]\n")
    assert parse("train", ["--config", str(file)]).config.lr_decay_at == [0.5], "a saved config says both"


def resolved(*flags):
    """(lr, steps of it, config) as the run would have them."""
    config = with_rate(parse("distill", ["--preset", "mgd", *flags]).config)
    return config.lr, list(make_settings(config, 1).lr_decay_epochs), config


def test_mobile_networks_have_the_rate_of_preset_mgd(tmp_path):
    rate, milestones, config = resolved("--base", "resnet8_x4")
    assert (rate, milestones, config.nesterov) == (0.05, [151, 181, 211], False)
    mobile = ("mobilenet_v2_cifar", "shufflenet_v1_cifar", "shufflenet_v2_cifar")
    for base in (*mobile, "mobilenet_v2", "shufflenet_v2_x1_0:pretrained=false"):
        rate, _, config = resolved("--base", base)
        assert rate == 0.01 and with_rate(config) == config
        file = tmp_path / "again.yaml"
        file.write_text(yaml.safe_dump({key: v for key, v in to_dict(config).items() if v is not None}))
        assert with_rate(parse("distill", ["--config", str(file)]).config).lr == 0.01
        assert with_rate(parse("distill", ["--config", str(file), "--lr", "0.3"]).config).lr == 0.3
        assert resolved("--base", base, "--lr", "0.2")[0] == 0.2
    assert resolved("--base", "resnet8", "--lr_for", "resnet*=0.3", "--lr_for", "*8=0.2")[0] == 0.3
    for rule in ("resnet8", "=1", "resnet8=x", "resnet8=-1", "a=nan"):
        with pytest.raises(UserError, match="is no rule"):
            resolved("--lr_for", rule)
