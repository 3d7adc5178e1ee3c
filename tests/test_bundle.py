"""A bundle is tensors and JSON: it comes back as it was, damage is noticed, and nothing in its folder is
ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ncf_dist import files
from ncf_dist.bundle import (
    CARD,
    PARTS,
    WEIGHTS,
    Bundle,
    load_model,
    load_parts,
    read_bundle,
    save_bundle,
    verify_weights,
)
from ncf_dist.config import Model
from ncf_dist.errors import ContractError, TrainingFailed
from ncf_dist.files import write_bytes
from ncf_dist.item_item.part import Part
from ncf_dist.item_item.rows import ItemRows
from ncf_dist.models import Recommender, build_model
from ncf_dist.stored import MAX_JSON_BYTES

CONFIG = Model(name="neumf", factors=3, layers=(6, 4, 2), dropout=0.25)
USERS, ITEMS = 5, 7


def trained(seed: int = 1) -> Recommender:
    torch.manual_seed(seed)
    return build_model(CONFIG, USERS, ITEMS)


def save(folder: Path, model: Recommender) -> Bundle:
    return save_bundle(str(folder), model, CONFIG, USERS, ITEMS, {"prepare_run": "p1", "seed": 1})


def parts(weight: float = 0.5) -> tuple[Part, Part]:
    """What follows item 0, and what is had with items 0 and 1."""
    follows = ItemRows(
        torch.tensor([0, 2, 2, 2, 2, 2, 2, 2]),
        torch.tensor([1, 3], dtype=torch.int32),
        torch.tensor([1.5, 0.25]),
        torch.arange(float(ITEMS)),
    )
    had = ItemRows(torch.tensor([0, 1, 2, 2, 2, 2, 2, 2]), torch.tensor([4, 0], dtype=torch.int32), torch.ones(2))
    return Part("counts", weight, 2.0, 20, follows), Part("ease", 5.0, 30.0, 100, had)


def save_with_parts(folder: Path, weight: float = 0.5) -> Bundle:
    return save_bundle(str(folder), trained(), CONFIG, USERS, ITEMS, {}, parts(weight))


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    model = trained()
    saved = save(tmp_path / "bundle", model)
    found = read_bundle(str(tmp_path / "bundle"))
    assert found == saved
    assert (found.model, found.n_users, found.n_items) == (CONFIG, USERS, ITEMS)
    assert found.facts == {"prepare_run": "p1", "seed": 1}
    verify_weights(found)
    loaded = load_model(found)
    pairs = torch.arange(USERS)[:, None], torch.arange(ITEMS)[None]
    with torch.no_grad():
        assert torch.equal(loaded(*pairs), model.eval()(*pairs))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
def test_the_processes_of_a_machine_share_the_weights(tmp_path: Path) -> None:
    """Every parameter lies in a mapping of the file: unwritten, its pages are the page cache's."""
    model = load_model(save(tmp_path, trained()))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if WEIGHTS in line]
    mapped = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    for name, parameter in model.named_parameters():
        assert any(start <= parameter.data_ptr() < end for start, end in mapped), name


def test_a_loaded_model_is_for_reading(tmp_path: Path) -> None:
    model = load_model(save(tmp_path, trained()))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_model_version_names_the_weights(tmp_path: Path) -> None:
    first, again, other = (save(tmp_path / str(n), trained(seed)) for n, seed in enumerate((1, 1, 2)))
    assert first.model_version == again.model_version == f"neumf-{first.sha256[:12]}"
    assert other.model_version != first.model_version


@pytest.mark.parametrize("file", [WEIGHTS, PARTS])
@pytest.mark.parametrize("place", ["first byte", "middle", "last byte"])
def test_one_flipped_bit_is_noticed(tmp_path: Path, place: str, file: str) -> None:
    bundle = save_with_parts(tmp_path)
    data = bytearray((tmp_path / file).read_bytes())
    data[{"first byte": 0, "middle": len(data) // 2, "last byte": -1}[place]] ^= 1
    (tmp_path / file).write_bytes(data)
    with pytest.raises(ContractError, match=f"{file} has SHA-256 .* damaged, rerun the job train"):
        verify_weights(bundle)


@pytest.mark.parametrize("file", [WEIGHTS, PARTS])
def test_missing_weights(tmp_path: Path, file: str) -> None:
    bundle = save_with_parts(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(ContractError, match="cannot be read .* rerun the job train"):
        verify_weights(bundle)


@pytest.mark.parametrize("damage", ["missing", "not JSON", "a field too few", "an unknown field", "a bad model"])
def test_a_card_that_cannot_be_used(tmp_path: Path, damage: str) -> None:
    save(tmp_path, trained())
    path = tmp_path / CARD
    card = json.loads(path.read_text())
    without = {name: value for name, value in card.items() if name != "n_users"}
    texts = {
        "not JSON": "{",
        "a field too few": json.dumps(without),
        "an unknown field": json.dumps({**card, "extra": 1}),
        "a bad model": json.dumps({**card, "model": {"name": "svd"}}),
    }
    path.unlink() if damage == "missing" else path.write_text(texts[damage])
    with pytest.raises(ContractError, match=f"{WEIGHTS} and {CARD}: rerun the job train"):
        read_bundle(str(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_never_saved(tmp_path: Path, value: float) -> None:
    model = trained()
    with torch.no_grad():
        model.get_parameter("gmf.item.weight")[3, 1] = value
    with pytest.raises(TrainingFailed, match=r"gmf\.item\.weight are not all finite"):
        save(tmp_path / "bundle", model)
    assert not (tmp_path / "bundle").exists()


# ---- with item-to-item parts -------------------------------------------------------------------------------


def test_parts_come_back(tmp_path: Path) -> None:
    saved = save_with_parts(tmp_path / "local")
    remote = f"memory://{tmp_path.name}"
    for name in (WEIGHTS, PARTS, CARD):
        write_bytes(f"{remote}/{name}", (tmp_path / "local" / name).read_bytes())
    for found in (read_bundle(saved.path), read_bundle(remote)):
        assert (found.parts, found.model_version, found.looks_back) == (saved.parts, saved.model_version, 100)
        verify_weights(found)
        for part, wanted in zip(load_parts(found), parts(), strict=True):
            assert (part.name, part.weight, part.half_life, part.last) == (
                wanted.name, wanted.weight, wanted.half_life, wanted.last
            )  # fmt: skip
            tensors = part.rows.tensors("it")
            assert all(torch.equal(tensor, tensors[name]) for name, tensor in wanted.rows.tensors("it").items())


def test_a_bundle_without_parts_is_what_it_was(tmp_path: Path) -> None:
    """Its card says nothing of parts, so that earlier versions read it, too."""
    bundle = save(tmp_path, trained())
    assert set(json.loads((tmp_path / CARD).read_text())) == {
        "facts", "model", "model_version", "n_items", "n_users", "sha256"
    }  # fmt: skip
    assert not (tmp_path / PARTS).exists()
    assert (bundle.parts, bundle.looks_back, load_parts(read_bundle(str(tmp_path)))) == (None, 0, ())


def test_model_version_names_the_parts(tmp_path: Path) -> None:
    """Other parts, or another weight of one, are another model; the weights alone are another one still."""
    first, again, other = (save_with_parts(tmp_path / str(n), weight) for n, weight in enumerate((0.5, 0.5, 0.6)))
    plain = save(tmp_path / "plain", trained())
    assert first.model_version == again.model_version
    assert first.sha256 == other.sha256 == plain.sha256
    assert len({first.model_version, other.model_version, plain.model_version}) == 3


def test_a_card_whose_parts_were_changed(tmp_path: Path) -> None:
    save_with_parts(tmp_path)
    card = json.loads((tmp_path / CARD).read_text())
    card["parts"]["parts"][0]["weight"] = 50.0
    (tmp_path / CARD).write_text(json.dumps(card))
    with pytest.raises(ContractError, match="its model and weights say"):
        read_bundle(str(tmp_path))


WRONG_PARTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    r"counts\.offsets is missing": lambda t: t.pop("counts.offsets"),
    r"ease\.items are not all from 0 to 6": lambda t: t.update({"ease.items": torch.tensor([4, 7], dtype=torch.int32)}),
    r"counts\.column is torch\.float32 \[2\], needed torch\.float32 \[7\]": lambda t: t.update(
        {"counts.column": torch.zeros(2)}
    ),
    r"other is not part of it": lambda t: t.update({"other.values": torch.zeros(1)}),
}


@pytest.mark.parametrize("problem", WRONG_PARTS)
def test_parts_that_are_not_the_cards_are_refused_by_name(tmp_path: Path, problem: str) -> None:
    """Also where all digests fit: an item that is none would be read outside of the catalogue."""
    bundle = save_with_parts(tmp_path)
    tensors = safetensors.torch.load((tmp_path / PARTS).read_bytes())
    WRONG_PARTS[problem](tensors)
    (tmp_path / PARTS).write_bytes(safetensors.torch.save(tensors))
    with pytest.raises(ContractError, match=f"{PARTS} is not what {CARD} says of it: {problem}: rerun the job train"):
        load_parts(bundle)


def test_parts_that_are_not_finite_are_never_saved(tmp_path: Path) -> None:
    broken = parts()
    broken[0].rows.values[1] = float("inf")
    with pytest.raises(TrainingFailed, match=r"counts\.values are not all finite"):
        save_bundle(str(tmp_path / "bundle"), trained(), CONFIG, USERS, ITEMS, {}, broken)
    assert not (tmp_path / "bundle").exists()


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    """Neither a pickle beside the weights nor one in their place is ever run."""
    bundle, mark = save(tmp_path, trained()), tmp_path / "ran"
    bomb = pickle.dumps(Bomb(mark))
    for name in ("model.pt", "weights.pkl", "pytorch_model.bin", "_common_metadata"):
        (tmp_path / name).write_bytes(bomb)
    load_model(read_bundle(str(tmp_path)))
    (tmp_path / WEIGHTS).write_bytes(bomb)
    with pytest.raises(ContractError):
        verify_weights(bundle)
    with pytest.raises(ContractError, match="(?i)header"):
        load_model(bundle)
    assert not mark.exists()
    pickle.loads(bomb)
    assert mark.exists(), "the bomb itself must work, or this test shows nothing"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Bundle:
    """A bundle whose digests fit weights that were changed."""
    save(folder, trained())
    tensors = safetensors.torch.load((folder / WEIGHTS).read_bytes())
    change(tensors)
    data = safetensors.torch.save(tensors)
    (folder / WEIGHTS).write_bytes(data)
    card = json.loads((folder / CARD).read_text())
    card["sha256"] = hashlib.sha256(data).hexdigest()
    card["model_version"] = f"neumf-{card['sha256'][:12]}"
    (folder / CARD).write_text(json.dumps(card))
    return read_bundle(str(folder))


WRONG_WEIGHTS: dict[str, Callable[[dict[str, torch.Tensor]], object]] = {
    r"gmf\.user\.weight is torch\.float32 \[6, 3\], needed torch\.float32 \[5, 3\]": lambda t: t.update(
        {"gmf.user.weight": torch.zeros(6, 3)}
    ),
    r"gmf\.item\.weight is torch\.bfloat16 .*, needed torch\.float32 .*": lambda t: t.update(
        {"gmf.item.weight": t["gmf.item.weight"].bfloat16()}
    ),
    r"tower\.hidden\.0\.bias is missing": lambda t: t.pop("tower.hidden.0.bias"),
    r"extra is not part of it": lambda t: t.update(extra=torch.zeros(1)),
}


@pytest.mark.parametrize("problem", WRONG_WEIGHTS)
def test_weights_of_another_model_are_refused_by_name(tmp_path: Path, problem: str) -> None:
    bundle = rewrite(tmp_path, WRONG_WEIGHTS[problem])
    verify_weights(bundle)
    with pytest.raises(ContractError, match=f"is not of the model in {CARD}: {problem}: rerun the job train"):
        load_model(bundle)


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path: Path, value: float) -> None:
    local = rewrite(tmp_path, lambda t: t["gmf.item.weight"].__setitem__((3, 1), value))
    remote = f"memory://{tmp_path.name}"
    for name in (WEIGHTS, CARD):
        write_bytes(f"{remote}/{name}", (tmp_path / name).read_bytes())
    for bundle in (local, read_bundle(remote)):
        with pytest.raises(ContractError, match=rf"{WEIGHTS}: gmf\.item\.weight are not all finite"):
            verify_weights(bundle)


@pytest.mark.parametrize(
    "change", [{"n_users": -1}, {"n_items": 2**62}, {"n_items": 10**40}, {"n_users": USERS + 1}], ids=str
)
def test_a_card_with_sizes_that_are_not_the_weights(tmp_path: Path, change: dict[str, int]) -> None:
    save(tmp_path, trained())
    card = {**json.loads((tmp_path / CARD).read_text()), **change}
    (tmp_path / CARD).write_text(json.dumps(card))
    with pytest.raises(ContractError, match="rerun the job train"):
        load_model(read_bundle(str(tmp_path)))


def test_a_version_that_is_not_of_the_weights(tmp_path: Path) -> None:
    """Else a flipped bit in the card would be published as the model's name."""
    bundle = save(tmp_path, trained())
    text = (tmp_path / CARD).read_text().replace(bundle.model_version, "neumf-000000000000")
    (tmp_path / CARD).write_text(text)
    with pytest.raises(ContractError, match="model_version is 'neumf-000000000000', its model and weights say"):
        read_bundle(str(tmp_path))


def test_a_document_too_large_to_be_ours_is_not_taken_into_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, trained())
    os.truncate(tmp_path / CARD, MAX_JSON_BYTES + 1)  # Sparse: it takes no disk.

    def never(path: str) -> bytes:
        raise AssertionError("it was read")

    monkeypatch.setattr(files, "read_bytes", never)
    with pytest.raises(ContractError, match="it has 268,435,457 bytes, needed at most 268,435,456"):
        read_bundle(str(tmp_path))
