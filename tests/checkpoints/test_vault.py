"""Which checkpoints of a folder count, in which order, and which of them go; no engine is needed for that."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from deepspeed import comm

from agvm_ds.checkpoints import CheckpointError, Layout, Manifest, Vault
from agvm_ds.checkpoints.vault import LATEST, MANIFEST, File, digest
from tests.launch import run_ranks

LAYOUT = Layout(
    ranks=2,
    stage=0,
    precision="float32",
    optimizer="SGD",
    wrapper="",
    groups=[],
    parameters=[],
    group_of=[],
    fragments=[],
)


def written(folder: Path, tag: str, update: int, interim: bool = False) -> Path:
    place = folder / tag
    place.mkdir(parents=True)
    (place / "x.pt").write_bytes(tag.encode())
    file = File(name="x.pt", rank=1, size=len(tag), sha256=digest(place / "x.pt"))
    manifest = Manifest(update=update, interim=interim, seed=3, layout=LAYOUT, files=[file])
    (place / MANIFEST).write_text(manifest.model_dump_json())
    (folder / LATEST).write_text(tag)
    return place


def test_newest_first_and_a_lasting_one_before_an_interim_of_the_same_update(tmp_path: Path) -> None:
    written(tmp_path, "epoch_2", 12)
    written(tmp_path, "update_18", 18, interim=True)
    written(tmp_path, "epoch_3", 18)
    written(tmp_path, "epoch_10", 60)
    written(tmp_path, ".epoch_11.draft", 66)
    (written(tmp_path, "epoch_9", 54) / MANIFEST).write_text("{")
    assert Vault(tmp_path).by_age() == ["epoch_10", "epoch_3", "update_18", "epoch_2"]
    with pytest.raises(CheckpointError, match=r"epoch_9/manifest.json: damaged"):
        Vault(tmp_path).manifest("epoch_9")


def test_one_process_finds_damage_in_the_files_of_all_ranks(tmp_path: Path) -> None:
    place = written(tmp_path, "epoch_1", 6)
    assert Vault(tmp_path).damage("epoch_1") == []
    (place / "x.pt").write_bytes(b"epoch_")
    assert Vault(tmp_path).damage("epoch_1") == [f"{place / 'x.pt'}: 6 bytes, 7 were written: cut short or overwritten"]
    (place / "x.pt").unlink()
    assert Vault(tmp_path).damage("epoch_1") == [f"{place / 'x.pt'}: missing"]
    (place / MANIFEST).unlink()
    assert Vault(tmp_path).damage("epoch_1") == [f"{place / MANIFEST}: missing"]


def test_a_file_of_two_hosts_is_whole_when_it_is_that_of_one(tmp_path: Path) -> None:
    """Each host with a folder of its own writes the model's file; they may differ, and only one is here."""
    place = written(tmp_path, "epoch_1", 6)
    manifest = Vault(tmp_path).manifest("epoch_1")
    assert manifest is not None
    other = manifest.files[0].model_copy(update={"rank": 0, "host": "other", "sha256": "0" * 64})
    both = manifest.model_copy(update={"files": [other, *manifest.files]})
    (place / MANIFEST).write_text(both.model_dump_json())
    assert Vault(tmp_path).damage("epoch_1") == []


def pruned(folder: Path) -> list[list[str]]:
    """In a rank: what is left after pruning to all, two, and one."""
    found = []
    for keep in (None, 2, 1):
        Vault(folder).prune(keep)
        found.append(sorted(path.name for path in folder.iterdir() if path.is_dir()))
    return found


def test_interim_ones_go_when_a_later_one_is_there_and_the_newest_stay(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    for tag, update in (("epoch_1", 6), ("update_8", 8), ("epoch_2", 12), ("epoch_3", 18)):
        written(folder, tag, update, interim=tag.startswith("update"))
    one, two = run_ranks(pruned, 2, tmp_path, folder)
    assert one == two == [["epoch_1", "epoch_2", "epoch_3"], ["epoch_2", "epoch_3"], ["epoch_3"]]


def looked_through(folder: Path) -> dict[str, list[str]]:
    """In a rank: the problems of each."""
    return {tag: Vault(folder).problems(tag) for tag in ("good", "cut", "flipped", "gone", "no manifest", "damaged")}


def test_each_kind_of_damage_is_found_by_all_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "states"
    written(folder, "good", 1)
    (written(folder, "cut", 1) / "x.pt").write_bytes(b"c")
    (written(folder, "flipped", 1) / "x.pt").write_bytes(b"fliqped")
    (written(folder, "gone", 1) / "x.pt").unlink()
    (written(folder, "no manifest", 1) / MANIFEST).unlink()
    (written(folder, "damaged", 1) / MANIFEST).write_text('{"update": 1')
    one, two = run_ranks(looked_through, 2, tmp_path, folder)
    assert one == two
    assert one["good"] == []
    for tag, words in (
        ("cut", "cut/x.pt: 1 bytes, 3 were written"),
        ("flipped", "SHA-256"),
        ("gone", "gone/x.pt: missing"),
    ):
        assert len(one[tag]) == 1 and words in one[tag][0]
    assert one["no manifest"] == [f"{folder}/no manifest/manifest.json: missing"]
    assert len(one["damaged"]) == 1 and "damaged" in one["damaged"][0]


def on_own_folders(place: Path) -> dict[str, Any]:
    """In a rank: the only one of its host, whose folder no other sees."""
    os.environ["LOCAL_RANK"] = "0"
    disk = place / f"disk_{comm.get_rank()}"
    vault = Vault(disk / "states")
    vault._once_a_folder((disk / "acted").touch)
    return {"shared": vault.shared, "missing": vault.elsewhere("epoch_1"), "aside": vault.set_aside()}


def test_a_folder_on_each_host(tmp_path: Path) -> None:
    """One rank a folder acts; a file is said to be on the host that wrote it; a new host has nothing to set aside."""
    place = written(tmp_path / "disk_0/states", "epoch_1", 6)
    manifest = Manifest.model_validate_json((place / MANIFEST).read_bytes())
    file = manifest.files[0].model_copy(update={"host": "beta"})
    (place / MANIFEST).write_text(manifest.model_copy(update={"files": [file]}).model_dump_json())
    (place / "x.pt").unlink()
    (tmp_path / "disk_1").mkdir()
    found = run_ranks(on_own_folders, 2, tmp_path, tmp_path)
    for rank, seen in enumerate(found):
        assert not seen["shared"]
        assert (tmp_path / f"disk_{rank}/acted").exists()
        (missing,) = seen["missing"]
        assert missing.startswith(f"{place}/x.pt: missing on ")
        assert "it is in this folder of beta" in missing
        assert (tmp_path / "disk_0" / seen["aside"].name / "epoch_1").is_dir()
    assert not list((tmp_path / "disk_1").glob("states_*"))


def in_one_folder(folder: Path) -> tuple[bool, bool, Path | None]:
    """In a rank that is the first of its host, too; nothing was saved yet."""
    os.environ["LOCAL_RANK"] = "0"
    vault, acted = Vault(folder), []
    vault._once_a_folder(lambda: acted.append(1))
    return vault.shared, bool(acted), vault.set_aside()


def test_in_a_folder_that_hosts_share_rank_zero_alone_acts(tmp_path: Path) -> None:
    assert run_ranks(in_one_folder, 2, tmp_path, tmp_path / "states") == [(True, True, None), (True, False, None)]
