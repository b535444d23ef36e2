"""Config files, variants, validation and fingerprints."""

import importlib
import json
import math

import pytest

from configs import default
from kdsr_jax.config import (
    BACKBONES,
    FIELDS,
    FUSED,
    NOT_FINGERPRINTED,
    differing_keys,
    fingerprint,
    flatten,
    to_dict,
    unknown_field,
    validate,
)
from kdsr_jax.errors import UserError

DATASETS = ("planted", "ml1m", "beauty", "clothing", "sports", "toys")
VARIANTS = (None, *(prefix + name for prefix in ("", "tuned-", "kdsr-") for name in BACKBONES))


def dataset_config(name, argument=None):
    config = importlib.import_module(f"configs.{name}").get_config(argument)
    config.data.root = "somewhere"
    return config


def changed(**fields):
    """The default config with fields set as plain values, whatever their type: ``model__dim=3``."""
    nested = to_dict(default.get_config())
    for path, value in fields.items():
        *groups, leaf = path.split("__")
        group = nested
        for key in groups:
            group = group[key]
        group[leaf] = value
    return nested


def complaint(**fields):
    with pytest.raises(UserError) as caught:
        validate(changed(**fields))
    return str(caught.value)


def test_every_default_field_has_a_check_and_the_reverse():
    assert set(flatten(to_dict(default.get_config()))) == set(FIELDS)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("argument", VARIANTS)
def test_every_dataset_config_is_valid_in_every_variant(name, argument):
    validate(dataset_config(name, argument))


@pytest.mark.parametrize("name", DATASETS)
def test_a_dataset_config_is_a_short_difference_with_its_command(name, repository):
    path = repository / "configs" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 30
    assert f"--config=configs/{name}.py" in importlib.import_module(f"configs.{name}").__doc__


def test_the_plain_config_is_kdsr_with_the_settings_of_the_paper():
    config = dataset_config("beauty")
    assert (config.model.name, config.model.tables, config.distill.enabled) == ("sasrm", "tuned", True)
    assert config.train.ramp_epochs > 0
    assert (config.distill.lambda_score, config.distill.lambda_code, config.distill.temperature) == (1.0, 0.5, 1.5)
    assert (config.teacher.num_splits, config.teacher.num_codes) == (8, 100)
    assert (config.model.dim, config.train.batch_size, config.data.max_length) == (128, 512, 50)
    movies = dataset_config("ml1m")
    assert (movies.distill.lambda_score, movies.distill.lambda_code) == (0.5, 0.1)


@pytest.mark.parametrize("name", DATASETS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_variants_set_backbone_tables_distillation_and_ramp(name, backbone):
    ramp = dataset_config(name).train.ramp_epochs
    for argument, expected in {
        backbone: (BACKBONES[backbone], False, 0),
        f"tuned-{backbone}": (BACKBONES[backbone] | {"tables": "tuned"}, False, ramp),
        f"kdsr-{backbone}": (BACKBONES[backbone] | {"tables": "tuned"}, True, ramp),
    }.items():
        config = dataset_config(name, argument)
        model, distilled, epochs = expected
        assert {field: config.model[field] for field in ("name", *model)} == {"name": backbone} | model, argument
        assert (config.distill.enabled, config.train.ramp_epochs) == (distilled, epochs), argument


def test_a_variant_changes_nothing_else():
    keys = {line.partition(":")[0] for line in differing_keys(changed(), to_dict(default.get_config("sasrec")))}
    assert keys == {"model.name", "model.tables", "distill.enabled", "train.ramp_epochs"}
    keys = {line.partition(":")[0] for line in differing_keys(changed(), to_dict(default.get_config("tuned-srgnn")))}
    assert keys == {"distill.enabled", "model.name"} | {f"model.{field}" for field in BACKBONES["srgnn"]} - {
        "model.tables"
    }


@pytest.mark.parametrize(
    "argument", ["", "sasrek", "kdsr-", "kdsr-gru9", "frozen-sasrec", "tuned", "kdsr-tuned-sasrec"]
)
def test_an_unknown_variant_lists_the_choices(argument):
    with pytest.raises(UserError, match="gru4rec, sasrec, srgnn, .*kdsr-gru4rec"):
        default.get_config(argument)


def test_a_misspelt_variant_gets_the_nearest_one():
    with pytest.raises(UserError, match="did you mean kdsr-sasrec"):
        default.get_config("kdsr-sasrek")


# Each field at values just outside of what it may hold, and at the last ones inside.
OUTSIDE = {
    "seed": (-1, 0.5, True, 2**31),
    "data.name": ("", "../beauty", "a/b", 3),
    "data.source": ("tfd", "", None),
    "data.root": (3, None),
    "data.manual_dir": (3, None),
    "data.k_core": (0, -5, 1.5),
    "data.user_fraction": (0, -0.1, 1.1),
    "data.max_length": (1,),
    "data.window_stride": (-1, 51),
    "data.histories": ("memory", True),
    "data.modalities": (["text"], ["text-a", "text-b"], ["item-x"], ["num-x"], [7], ["text-../x"]),
    "data.columns.user_id": ("", " ", 3),
    "data.columns.item_id": ("", None),
    "data.columns.timestamp": ("", 3),
    "data.columns.title": ("", 3),
    "encode.missing": (1, "yes"),
    "encode.text_fields": (["title", "title"], [""], [3]),
    "encode.field_characters": (0, 1.5),
    "encode.template": ("no fields", "{title", "{}", "{title.upper}", "{title!r}", "{title:>3}", "{0}", "{0title}", 3),
    "encode.layer": (-1001, 1001, 0.5),
    "encode.batch_size": (0, 65537),
    "encode.revision": (3, None),
    "encode.models_folder": (3, None),
    "encode.trust_remote_code": (1, None),
    "data.planted.num_users": (0,),
    "data.planted.num_items": (17,),
    "data.planted.mean_length": (5.9, 200.1, math.inf),
    "data.planted.entanglement": (-0.1, 1.1),
    "data.planted.noise": (-0.1, math.nan),
    "data.planted.missing_rate": (1.1, -0.1),
    "data.planted.cold_rate": (0.6, -0.1),
    "data.planted.feature_dim": (7,),
    "data.planted.seed": (-1,),
    "teacher.condensed_dim": (-8, 12),
    "teacher.autoencoder": ("liner",),
    "teacher.rotation": (None, "opq"),
    "teacher.score_fn": ("cos",),
    "teacher.num_splits": (0, 7, 256),
    "teacher.num_codes": (1, 65536),
    "teacher.quantizer": ("k-means",),
    "teacher.num_pairs": (0,),
    "teacher.seed": (-1,),
    "distill.enabled": (1, "yes"),
    "distill.lambda_score": (-1.0, math.nan, math.inf),
    "distill.lambda_code": (-1.0, "much"),
    "distill.temperature": (0.0, -1.5, math.nan),
    "distill.sigma": ("tanh",),
    "distill.pair_budget": (-1,),
    "model.name": ("sasrek", "kdsr"),
    "model.tables": ("tunned", "frozen"),  # frozen clashes with distillation
    "model.dim": (0, 127),
    "model.num_layers": (0,),
    "model.num_heads": (0, 3),
    "model.hidden_dropout": (1.0, -0.1, True),
    "model.attention_dropout": (1.0, -0.1),
    "model.fusion": ("add",),
    "model.readout": ("first",),
    "model.short_term": (0,),
    "model.item_scores": ("id",),
    "model.table_scale": (0.0,),
    "model.num_clusters": (0, 2),  # fewer than the links of an item
    "model.cluster_links": (0, 31),
    "model.cluster_weight": (-0.1, math.inf),
    "model.official_quirks": (1, "no"),
    "model.score_temperature": (0.0, -0.05),
    "model.warmup_epochs": (-1, 10_001),
    "train.epochs": (-1, 0, 5.5, 100_001),
    "train.batch_size": (0, -1, 1_000_001),
    "train.sampled_items": (-1, 1.5, True, 10_000_001),
    "train.sparse_tables": (1, "yes", True),  # True without drawn items
    "train.prefixes": (1, "yes"),
    "train.learning_rate": (0.0, -1e-3, math.nan, math.inf, True),
    "train.weight_decay": (-1e-5, math.inf),
    "train.clip_norm": (-1.0,),
    "train.ramp_epochs": (-1, 10_001),
    "train.ramp_start": (-0.1, 1.1),
    "train.ramp_end": (0.0, 1.1),
    "train.steps_per_call": (0, 10_001),
    "train.matmul_precision": ("float16", "bfloat16"),
    "train.patience": (0,),
    "eval.protocol": ("test",),
    "eval.every": (0,),
    "eval.topk": ([], [0], [5, 5], [10, 5], ["a"], [True], 5),
    "eval.filter_seen": (0,),
    "mesh.data": (-1, 0.5),
    "mesh.model": (-1, "2"),
    "mesh.distributed": (1, "yes"),
    "mesh.coordinator": (3, "host", "host:", "http://host:1"),
    "mesh.num_processes": (0, 2),
    "mesh.process": (-1, 1),
    "forgetting.num_pairs": (-1, 10_000_001, 0.5),
    "forgetting.reference_workdir": (3, None),
    "log.tensorboard": (1, "yes"),
}
INSIDE = {
    "data.k_core": (1,),
    "data.user_fraction": (1e-9, 1),
    "data.max_length": (2,),
    "data.window_stride": (50,),
    "data.modalities": (["image-efficientnet-lite0", "text-minilm"],),
    "data.planted.entanglement": (0, 1),
    "teacher.condensed_dim": (64,),
    "teacher.num_splits": (1, 128),
    "teacher.num_codes": (2, 65535),
    "distill.lambda_score": (0, 0.0),
    "distill.pair_budget": (0,),
    "model.hidden_dropout": (0, 0.9),
    "model.num_heads": (1, 128),
    "model.num_clusters": (3,),
    "model.cluster_links": (1, 30),
    "model.cluster_weight": (0, 0.1),
    "model.warmup_epochs": (0,),  # mmsrec alone has one
    "data.planted.mean_length": (6, 200),
    "train.epochs": (1, 100_000),
    "train.batch_size": (1, 1_000_000),
    "train.ramp_epochs": (0, 10_000),
    "train.steps_per_call": (1, 10_000),
    "train.ramp_start": (0.0, 1.0),
    "train.ramp_end": (0.01, 1.0),
    "eval.topk": ([1], [5, 20]),
    "mesh.coordinator": ("10.0.0.1:12345", "[::1]:80", ""),
}


def test_every_field_is_tried_outside_of_its_range():
    assert set(OUTSIDE) == set(FIELDS)


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in OUTSIDE for value in OUTSIDE[name]])
def test_a_value_outside_is_refused_in_one_line_with_its_flag(name, value):
    message = complaint(**{name.replace(".", "__"): value})
    assert message.startswith("--config.") and "\n" not in message
    # Rules between two fields may name the other one first.
    assert f"--config.{name}" in message


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in INSIDE for value in INSIDE[name]])
def test_the_last_values_inside_are_accepted(name, value):
    validate(changed(**{name.replace(".", "__"): value}))


def test_a_wrong_choice_lists_the_choices_and_the_nearest():
    assert complaint(distill__sigma="sigmoids") == (
        "--config.distill.sigma=sigmoids: must be one of sigmoid, softmax, identity; did you mean sigmoid?"
    )


def test_a_whole_number_too_large_is_told_the_bound():
    assert complaint(seed=99999999999999).endswith("must be a whole number from 0 to 2147483647")
    assert complaint(train__batch_size=2**30).endswith("from 1 to 1000000")


@pytest.mark.parametrize(("tables", "published"), [("frozen", "sasrm"), ("none", "sasrec")])
def test_distillation_into_other_than_tuned_tables_is_told_both_ways_out(tables, published):
    message = complaint(model__tables=tables)
    assert message.startswith(f"--config.model.tables={tables}: ")
    assert f"--config.distill.enabled=false or FILE:{published};" in message
    assert "--config.model.tables=tuned or FILE:kdsr-sasrm" in message
    validate(changed(model__tables=tables, distill__enabled=False))


@pytest.mark.parametrize("tables", ["frozen", "tuned"])
@pytest.mark.parametrize("distilled", [False, True])
def test_tables_need_a_modality(tables, distilled):
    message = complaint(data__modalities=[], model__tables=tables, distill__enabled=distilled)
    assert message.startswith("--config.data.modalities=: ") and f"--config.model.tables={tables}" in message
    assert "FILE:sasrec" in message and "--config.model.tables=none" in message
    assert ("--config.distill.enabled=false" in message) == distilled


def test_a_joint_codebook_has_a_linear_encoder():
    message = complaint(teacher__quantizer="vq_joint", teacher__autoencoder="sigmoid")
    assert (
        message.startswith("--config.teacher.autoencoder=sigmoid: ") and "vq_joint trains a linear encoder" in message
    )
    validate(changed(teacher__quantizer="vq_joint", teacher__autoencoder="pca"))


def test_a_model_without_ids_needs_tables():
    message = complaint(model__name="mmsrec", model__tables="none", distill__enabled=False)
    assert message.startswith("--config.model.tables=none: mmsrec has no item ids")


@pytest.mark.parametrize("fields", [{"model__name": "mmsr"}, {"model__cluster_weight": 0.1}])
def test_clusters_need_a_modality(fields):
    bare = {"data__modalities": [], "model__tables": "none", "distill__enabled": False}
    assert complaint(**bare, **fields).startswith("--config.data.modalities=: clusters of items need")
    validate(changed(**bare | {"data__modalities": ["text-a"]}, **fields))
    message = complaint(**bare | {"data__modalities": ["text-a"]}, **fields, teacher__num_splits=7)
    assert message.startswith("--config.teacher.num_splits=7")  # they are found among the condensed features


def test_only_models_that_read_fused_vectors_score_against_them():
    for name in BACKBONES:
        fields = {"model__name": name, "model__item_scores": "fused"}
        if name in FUSED:
            validate(changed(**fields))
        else:
            complained = complaint(**fields)
            assert complained.startswith(f"--config.model.item_scores=fused: {name} has no fused item vectors")


def test_only_models_that_fuse_have_a_fusion_to_choose():
    for name in BACKBONES:
        fields = {"model__name": name, "model__fusion": "concat"}
        if name in ("trans2d", "mmsr_nodes", "mmsrec"):
            complained = complaint(**fields)
            assert complained == f"--config.model.fusion=concat: must be left at gate; {name} fuses nothing by it"
        else:
            validate(changed(**fields))


def test_sparse_tables_need_drawn_items_and_whole_tables():
    drawn = {"train__sparse_tables": True, "train__sampled_items": 100}
    validate(changed(**drawn, mesh__model=1))
    assert complaint(train__sparse_tables=True) == (
        "--config.train.sparse_tables=True: needs --config.train.sampled_items=K; a softmax over all items touches every row"
    )
    message = complaint(**drawn, mesh__model=2)
    assert message.startswith("--config.train.sparse_tables=True: needs whole tables") and "mesh.model=2" in message
    assert fingerprint(changed(**drawn)) != fingerprint(changed(train__sampled_items=100))


def test_planted_histories_are_at_most_a_third_of_the_items():
    message = complaint(data__planted__num_items=30)
    assert message.startswith("--config.data.planted.mean_length=12.0: must be at most a third of")
    assert message.endswith("--config.data.planted.num_items=30")
    validate(changed(data__planted__num_items=36))
    validate(changed(data__planted__num_items=18, data__planted__mean_length=6.0))


def test_item_ids_alone_need_no_modality_and_no_split():
    validate(changed(data__modalities=[], model__tables="none", distill__enabled=False, teacher__num_splits=7))


def test_splits_divide_the_condensed_width():
    assert "--config.model.dim=128" in complaint(teacher__num_splits=7)
    assert "--config.teacher.condensed_dim=60" in complaint(teacher__condensed_dim=60)
    validate(changed(teacher__condensed_dim=60, teacher__num_splits=6))


@pytest.mark.parametrize(("name", "source"), [("beauty", "auto"), ("planted", "folder")])
def test_real_data_needs_a_root(name, source):
    assert "--config.data.root is missing" in complaint(data__name=name, data__source=source)
    validate(changed(data__name=name, data__source=source, data__root="somewhere"))


@pytest.mark.parametrize(("name", "source"), [("ml-1m", "auto"), ("toys", "amazon"), ("ml-1m", "movielens")])
def test_public_data_needs_a_root_for_features_alone(name, source):
    fields = {"data__name": name, "data__source": source}
    assert f"{name}/features/image-facets.npz; FILE:sasrec needs none" in complaint(**fields)
    validate(changed(**fields, model__tables="none", distill__enabled=False, model__name="sasrec"))


@pytest.mark.parametrize(("name", "source"), [("beauty", "movielens"), ("ml-1m", "amazon"), ("planted", "amazon")])
def test_a_public_source_has_data_sets_of_its_own(name, source):
    assert f"not --config.data.name={name}" in complaint(data__name=name, data__source=source)


def test_missing_and_foreign_fields_are_named():
    nested = changed()
    del nested["train"]["epochs"]
    with pytest.raises(UserError, match="--config.train.epochs: missing"):
        validate(nested)
    with pytest.raises(UserError, match="did you mean --config.train.learning_rate"):
        validate(changed(train__lerning_rate=1.0))


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("epochs", "train.epochs"),
        ("model.epochs", "train.epochs"),
        ("distil.temperature", "distill.temperature"),
    ],
)
def test_an_unknown_field_gets_the_nearest_one(name, nearest):
    assert unknown_field(name).endswith(f"did you mean --config.{nearest}?")


def test_nothing_is_guessed_where_nothing_is_near():
    assert "did you mean" not in unknown_field("zzz")
    assert "group" in unknown_field("train")


def test_to_dict_is_plain_json():
    nested = to_dict(default.get_config())
    assert json.loads(json.dumps(nested)) == nested


def test_the_fingerprint_ignores_where_the_data_lies_and_what_is_only_watched():
    config = default.get_config()
    before = fingerprint(config)
    assert len(before) == 64 and int(before, 16) >= 0
    assert before == fingerprint(to_dict(config)) == fingerprint(default.get_config())
    config.data.root = "elsewhere"
    config.forgetting.num_pairs, config.forgetting.reference_workdir, config.log.tensorboard = 0, "runs/ids", True
    config.mesh.data, config.mesh.model, config.mesh.distributed = 4, 2, True
    assert fingerprint(config) == before


@pytest.mark.parametrize("name", [name for name in FIELDS if name not in NOT_FINGERPRINTED])
def test_the_fingerprint_changes_with_every_other_field(name):
    other = changed(**{name.replace(".", "__"): "another value"})
    assert fingerprint(other) != fingerprint(changed())


def test_the_fingerprint_does_not_depend_on_the_order_of_fields():
    nested = changed()
    turned = {key: nested[key] for key in reversed(list(nested))}
    assert fingerprint(turned) == fingerprint(nested)


def test_differing_keys_are_named_with_both_values():
    saved, current = changed(), changed(train__epochs=7, data__modalities=["text-facets"], data__root="x")
    del saved["train"]["clip_norm"]
    assert differing_keys(saved, current) == [
        'data.modalities: ["image-facets", "text-facets"] -> ["text-facets"]',
        "train.clip_norm: absent -> 0.0",
        "train.epochs: 100 -> 7",
    ]
    assert differing_keys(changed(), changed(data__root="x")) == []


def test_a_saved_config_that_went_through_json_does_not_differ():
    config = default.get_config()
    assert differing_keys(json.loads(json.dumps(to_dict(config))), config.to_dict()) == []


def test_several_processes_need_each_other_and_features_that_are_there():
    three = {"mesh__coordinator": "host:1", "mesh__num_processes": 3}
    validate(changed(**three, mesh__process=2))
    assert "must be less than --config.mesh.num_processes=3" in complaint(**three, mesh__process=3)
    assert "needs --config.mesh.coordinator=HOST:PORT" in complaint(mesh__num_processes=3)
    assert "kdsr_jax.encode first" in complaint(mesh__distributed=True, encode__missing=True)
