"""The configuration: every mistake is named with what was found, what is allowed and the nearest key."""

from __future__ import annotations

import ast
import contextlib
import copy
import datetime as dt
import inspect
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from pydantic import ValidationError

from ncf_dist import config as settings
from ncf_dist.config import Config, Model, Section, load_config, parse_ds
from ncf_dist.config.train import LOSSES, Loss
from ncf_dist.errors import ConfigError
from ncf_dist.reference import reference
from ncf_dist.train import losses

ROOT = Path(__file__).parent.parent
SMALL = "paths: {lake: l}\ninput: {path: log.dat}\n"
Load = Callable[..., Config]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    """load(text, *overrides) → the config of a file that holds `text`."""

    def load(text: str | bytes = SMALL, *overrides: str) -> Config:
        path = tmp_path / "conf.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_config(path, overrides)

    return load


def refused(load: Load, text: str | bytes = SMALL, *overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load(text, *overrides)
    return str(error.value)


def test_what_is_left_out_has_a_default(load: Load) -> None:
    config = load()
    assert (config.paths.lake, config.input.path) == ("l", "log.dat")
    assert (config.seed, config.negatives.per_positive, config.score.k) == (1, 4, 10)


def test_a_day_that_no_month_has_names_its_setting(load: Load) -> None:
    message = refused(load, SMALL, "input.until=2024-06-31")
    assert "input.until" in message
    assert "2024-06-31" in message


@pytest.mark.parametrize("path", sorted((ROOT / "conf").glob("*.yaml")), ids=lambda path: path.name)
def test_the_examples_in_conf_are_valid(path: Path) -> None:
    load_config(path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sede=3", "unknown key sede (did you mean seed?)"),
        ("trian.epochs=3", "unknown key trian (did you mean train?)"),
        ("train.epoch=3", "unknown key train.epoch (did you mean train.epochs?)"),
        ("input.min_ratings=3", "unknown key input.min_ratings (did you mean input.min_rating?)"),
        ("fetch.form=x", "unknown key fetch.form (did you mean fetch.from?)"),
        ("publish.zzz=3", "unknown key publish.zzz (known here: table, require, verify, rollback_to)"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(load: Load, override: str, message: str) -> None:
    assert message in refused(load, SMALL, override)


PLACES = ["../evil", "/etc/evil", "a/b", "a\\b", "", " ", ".", "..", ".hidden", "_delta_log", "runs", "RAW", "s3://b/t",
          "a\nb", "a\0b", "t ", "t.", "~", "~root", "$HOME", "%2e%2e", "ds=1", "a" * 65, "*", "-rf"]  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_the_published_table_stays_in_its_place(load: Load, name: str) -> None:
    with pytest.raises(ConfigError, match="publish.table is .*; needed one plain name") as error:
        load(f"{SMALL}publish: {{table: {json.dumps(name)}}}\n")
    assert error.value.exit_code == 2


@given(st.one_of(st.text(max_size=70), st.text("./_-~ aR0%:\\\n\t", max_size=6), st.sampled_from(PLACES)))
def test_a_table_s_name_is_one_visible_folder_of_the_lake(name: str) -> None:
    try:
        table = settings.Publish(table=name).table
    except ValidationError:
        return
    lake = Path("/lake")
    assert Path(os.path.normpath(lake / table)).parent == lake
    assert table == name == Path(os.path.normpath(lake / table)).name
    assert table.casefold() not in settings.RESERVED
    assert not table.startswith((".", "_", "-"))
    assert table.isprintable()
    assert len(table.encode()) <= 255


@pytest.mark.parametrize("name", ["recommendations", "no fallback", "v2", "Empfehlungen_für_dich", "a.b-c", "7"])
def test_plain_names_are_taken(name: str) -> None:
    assert settings.Publish(table=name).table == name


def test_every_mistake_is_reported_at_once(load: Load) -> None:
    message = refused(load, SMALL, "train.epoch=3", "seed=0", "score.k=0")
    assert all(key in message for key in ("train.epoch", "seed is 0", "score.k is 0"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("paths: {lake: l}\n", "input is missing"),
        ("paths: {}\ninput: {path: x}\n", "paths.lake is missing"),
        ("paths:\ninput: {path: x}\n", "paths.lake is missing; add it"),
        ("- paths\n- input\n", "holds list; needed sections"),
        ("", "holds NoneType; needed sections"),
        ("paths: {lake: l\n", "is not valid YAML"),
        ("input: {until: 2024-02-30}\n", "is not valid YAML: day is out of range for month"),
        ("a: &a [*a]\n" + "b: " + "[" * 5_000 + "\n", "is not valid YAML"),
        (b"paths: {lake: \xff}\n", "is not valid YAML"),
        ("paths: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
)
def test_a_file_that_is_not_a_config_says_why(load: Load, text: str | bytes, message: str) -> None:
    assert message in refused(load, text)


def test_a_config_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml cannot be read \(No such file"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=0", "seed is 0: input should be greater than or equal to 1"),
        ("train.lr=0", "train.lr is 0: input should be greater than 0"),
        ("train.epochs=many", "train.epochs is 'many': input should be a valid integer"),
        ("model.dropout=1", "model.dropout is 1: input should be less than 1"),
        (
            "model.name=svd",
            "model.name is 'svd': input should be 'gmf', 'mlp', 'neumf', 'mf', 'embedding_nn', 'history' or 'item_to_i",
        ),
        ("input.max_bad_fraction=1.5", "input.max_bad_fraction is 1.5"),
        ("split.min_interactions=2", "split.min_interactions is 2"),
        ("evaluate.ks=[10, 0]", "evaluate.ks.1 is 0"),
        ("spark.driver_memory=2 GB", "spark.driver_memory is '2 GB'"),
        ("input.format=parquetish", "input.format is 'parquetish'"),
    ],
)
def test_a_bad_value_is_shown_with_what_is_allowed(load: Load, override: str, message: str) -> None:
    assert message in refused(load, SMALL, override)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["input.feedback=explicit", "train.loss=bce"], "train.loss is bce with input.feedback=explicit; needed mse"),
        (["train.loss=mse"], "train.loss is mse with input.feedback=implicit; needed mse for explicit"),
        (["model.name=mf", "model.y_range=[0, 5]"], "model.y_range is [0.0, 5.0] with input.feedback=implicit"),
        (["model.y_range=[0, 5]"], "model.y_range is [0.0, 5.0] with model.name=neumf; only mf and embedding_nn"),
        (["model.name=mf", "input.feedback=explicit", "model.y_range=[5, 1]"], "needed the lower bound first"),
        (["model.name=gmf", "train.pretrained={gmf: a, mlp: b}"], "train.pretrained is set with model.name=gmf"),
        (["train.warm_start=x", "train.pretrained={gmf: a, mlp: b}"], "a model starts from one of them"),
        (["train.nodes=2"], "train.nodes is 2 with train.rendezvous=None"),
        (["train.rendezvous=h:1"], "train.nodes is 1 with train.rendezvous=h:1"),
        (["train.nodes=2", "train.rendezvous=h:1", "train.launcher=spark"], "needed launcher torchrun"),
    ],
)
def test_settings_that_do_not_fit_together(load: Load, overrides: list[str], message: str) -> None:
    assert message in refused(load, SMALL, *overrides)


def test_every_loss_is_declared_with_what_it_needs(load: Load) -> None:
    """One without an entry would train on rows without negatives, and end with a loss that is not a number."""
    assert set(get_args(Loss)) == set(LOSSES) == set(losses.LOSSES)
    for name, (feedback, negatives) in LOSSES.items():
        config = load(SMALL, f"train.loss={name}", f"input.feedback={feedback}", "model.name=mf")
        assert (config.negatives_from is not None, config.shares_negatives) == (negatives == "row", negatives == "step")


def test_the_loss_follows_the_feedback(load: Load) -> None:
    assert load().loss == "bce"
    assert load(SMALL, "input.feedback=explicit", "model.name=mf").loss == "mse"
    assert load(SMALL, "train.loss=bpr").loss == "bpr"


@pytest.mark.parametrize("layers", ["[]", "[15, 8]"])
def test_an_mlp_tower_must_start_with_an_even_width(load: Load, layers: str) -> None:
    assert "give an even width" in refused(load, SMALL, f"model.layers={layers}")
    assert load(SMALL, "model.layers=[16, 7]").model.layers == (16, 7)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.epochs=5", "train", "epochs", 5),
        ("train.lr=1e-2", "train", "lr", 0.01),
        ("model.layers=[8, 4]", "model", "layers", (8, 4)),
        ("input.min_rating=null", "input", "min_rating", None),
        ("input.path=a=b.dat", "input", "path", "a=b.dat"),
        ("fetch.from=archive.zip", "fetch", "source", "archive.zip"),
        ("paths.work=s3://bucket/x", "paths", "work", "s3://bucket/x"),
    ],
)
def test_set_overrides_one_value_with_yaml_types(load: Load, override: str, section: str, key: str, value: Any) -> None:
    text = SMALL + "fetch: {dataset: ml-1m}\ntrain: {epochs: 2, lr: 0.1}\n"
    assert getattr(getattr(load(text, override), section), key) == value


def test_set_reaches_sections_that_the_file_leaves_out_or_empty(load: Load) -> None:
    assert load("paths: {lake: l}\n", "input.path=x").input.path == "x"
    assert load("paths: {lake: l}\ninput:\n", "input.path=x").input.path == "x"


def test_the_last_set_wins(load: Load) -> None:
    assert load(SMALL, "seed=2", "seed=3").seed == 3


@pytest.mark.parametrize("override", ["train.epochs", "train..epochs=1", ".epochs=1", "=1", ""])
def test_set_needs_a_key_and_an_equals_sign(load: Load, override: str) -> None:
    assert "needed section.key=value" in refused(load, SMALL, override)


def test_set_below_a_plain_value_is_refused(load: Load) -> None:
    message = refused(load, SMALL + "seed: 1\n", "seed.x=1")
    assert "seed is not a section" in message
    assert "known sections: paths, fetch, input" in message


def test_fetch_from_is_read_under_the_name_that_people_write(load: Load) -> None:
    text = SMALL + "fetch: {dataset: ml-1m, from: ml-1m.zip}\n"
    assert load(text).fetch.source == "ml-1m.zip"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["fetch.from=x.zip"], "fetch.dataset is synthetic, which is made, not taken"),
        (["fetch.items=10"], "fetch.clusters is 12 with 10 items"),
        (["fetch.items=99"], f"fetch.items, {99 * 60 // 100}"),
    ],
)
def test_a_log_that_cannot_be_made_is_refused(load: Load, overrides: list[str], message: str) -> None:
    assert message in refused(load, SMALL, *overrides)
    load(SMALL, "fetch.dataset=ml-1m", *overrides)


@pytest.mark.parametrize("text", ["2026-02-30", "20260131", "2026-1-31", "2026-W05-6", "tomorrow", "", " "])
def test_ds_is_a_date_that_exists(text: str) -> None:
    with pytest.raises(ConfigError, match="needed a date that exists, written YYYY-MM-DD"):
        parse_ds(text)


def test_ds_is_kept_as_written_and_defaults_to_today_in_utc() -> None:
    def today() -> str:
        return dt.datetime.now(dt.timezone.utc).date().isoformat()

    before, found, after = today(), parse_ds(None), today()
    assert before <= found <= after
    assert parse_ds("2024-02-29") == "2024-02-29"


def test_a_config_never_changes(load: Load) -> None:
    config = load()
    for section, key in ((config, "seed"), (config.train, "epochs"), (config.fetch, "source")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, key, 2)


def test_a_key_that_is_there_twice_is_refused(load: Load) -> None:
    message = refused(load, "paths: {lake: l}\ninput: {path: a, path: b}\n")
    assert "is not valid YAML: the key path is there twice; needed once" in message
    assert "the key seed is there twice" in refused(load, SMALL + "seed: 1\nseed: 2\n")


def test_a_section_with_nothing_in_it_has_its_defaults(load: Load) -> None:
    assert load(SMALL + "model:\n# name: mlp\n").model == Model()


def test_every_field_is_documented_where_it_is_declared() -> None:
    """A string follows each declaration; a field that is itself a section is documented by that section's fields."""
    declared, documented = set(), set()
    source = "\n".join(path.read_text() for path in (ROOT / "ncf_dist/config").glob("*.py"))
    for node in ast.parse(source.replace("from __future__ import annotations", "")).body:
        if isinstance(node, ast.ClassDef):
            for field, after in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    name = (node.name, field.target.id)
                    declared.add(name)
                    if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                        documented.add(name)
    sections = [kind for kind in vars(settings).values() if inspect.isclass(kind) and issubclass(kind, Section)]
    fields = {(kind.__name__, name) for kind in sections for name in kind.model_fields}
    inner = {("Config", name) for name, field in Config.model_fields.items() if field.annotation in sections}
    assert fields == declared
    assert fields - inner - documented == set()


def test_the_page_of_settings_is_up_to_date() -> None:
    assert (ROOT / "docs/settings.md").read_text() == reference(), "run make docs"


def test_the_page_of_settings_has_every_key_with_its_type_default_and_the_stages_it_remakes() -> None:
    page = reference()
    for name, field in Config.model_fields.items():
        keys = getattr(field.annotation, "model_fields", {})
        for key in [f"{name}.{inner.alias or key}" for key, inner in keys.items()] or [name]:
            assert f"- **`{key}`** · " in page
    assert "- **`train.eps`** · number > 0 · default `1.0e-08` · remakes train\n" in page
    assert "- **`train.timeout_s`** · whole number ≥ 1 · default `300`\n" in page
    assert "- **`input.path`** · text or [text, …] · needed · remakes prepare\n" in page
    assert "- **`input.items.columns.NAME.from`** · text or whole number ≥ 0 · needed · remakes prepare\n" in page


# ---- keys inside of keys -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ("items: {pth: y}", "unknown key input.items.pth (did you mean input.items.path?)"),
        ("items: {pth: y}", "input.items.path is missing"),
        ("users: {path: y, titel: 1}", "unknown key input.users.titel (did you mean input.users.title?)"),
        ("items: {path: y, columns: {genre: {frm: x}}}", "unknown key input.items.columns.genre.frm (did you mean "),
        (
            "items: {path: y, columns: {Bad: {from: x}}}",
            "input.items.columns.Bad is 'Bad': string should match pattern",
        ),
        ("items: 5", "input.items is 5: needed a section with path, format, separator, "),
        (
            "items: {path: y, title: 1.5}",
            "input.items.title is 1.5: input should be a valid string, or input should be",
        ),
        ("columns: {user: [1]}", "input.columns.user is [1]: input should be a valid string, or input should be a"),
        ("path: {a: 1}", "input.path is {'a': 1}: input should be a valid string, or input should be a valid tuple"),
        ("columns: {user: 2, item: 2}", "input.columns.user and input.columns.item are both 2; needed two columns"),
        ("fields: 4, columns: {user: 4}", "input.columns.user is 4 with input.fields 4; needed a position from 0 to 3"),
    ],
)
def test_a_mistake_inside_of_a_section_is_named(load: Load, section: str, message: str) -> None:
    given = section if section.startswith("path") else f"path: x, {section}"
    assert message in refused(load, f"paths: {{lake: l}}\ninput: {{{given}}}\n")


def test_a_side_table_may_be_its_path_alone_and_a_section_be_empty(load: Load) -> None:
    config = load("paths: {lake: l}\ninput: {path: x, items: movies.dat, users: users.dat, columns: }\n")
    assert config.input.items is not None
    assert config.input.users is not None
    assert (config.input.items.path, config.input.users.path) == ("movies.dat", "users.dat")
    assert config.input.columns == settings.Columns()


JUNK: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, 0, -1, 1.5, "x", "", [], [1, "x"], {}, {"path": "y"}, {"x": {"from": 1}}, {"a": {"b": {}}}]
)
FULL: dict[str, Any] = {
    "paths": {"lake": "l", "work": "w"},
    "input": {
        "path": ["a", "b"], "format": "csv", "columns": {"user": 0, "item": "i", "rating": None, "timestamp": "t"},
        "items": {"path": "m", "id": "i", "columns": {"genre": {"from": "g", "type": "string"}}}, "since": "2020-01-01",
        "rating_range": [1, 5], "allow_items": [1, "a"],
    },
    "split": {"strategy": "temporal"}, "train": {"epochs": 1, "part_decay": {"gmf": 0.1}, "betas": [0.9, 0.9]},
    "score": {"active_since": 30, "allow_items": "file"}, "evaluate": {"ks": [5]}, "seed": 1,
}  # fmt: skip


@settings_of(deadline=None, max_examples=60)
@given(st.data())
def test_whatever_is_wrong_in_a_config_is_a_config_error(tmp_path_factory: Any, data: st.DataObject) -> None:
    """One to three places of a full config, of any depth, are misnamed, or hold something else."""
    tree = copy.deepcopy(FULL)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = tree
        while True:
            key = data.draw(st.sampled_from(sorted(place)))
            if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
                place = place[key]
                continue
            if data.draw(st.booleans()):
                place[key] = copy.deepcopy(data.draw(JUNK))  # The next round may change what is inside of it.
            else:
                name = data.draw(st.sampled_from(["pth", "", "[key]", "SideTable", "0", "str", key + "s"]))
                place[name] = place.pop(key)
            break
    path = tmp_path_factory.mktemp("config") / "c.yaml"
    path.write_text(yaml.safe_dump(tree))
    with contextlib.suppress(ConfigError):
        assert isinstance(load_config(path), Config)
