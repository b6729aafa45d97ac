from birbal_ray.storage import RunError
from birbal_ray.train.checkpoints import Remote, all_checkpoints, finish_checkpoint, latest_checkpoint, remove_old


def write(folder, step, text="x"):
    written = folder / ".work" / f"checkpoint-{step}"
    written.mkdir(parents=True)
    (written / "optimizer.pt").write_text(text)
    return finish_checkpoint(written, folder)


def test_latest_is_by_number_and_unfinished_ones_do_not_count(tmp_path):
    assert latest_checkpoint(tmp_path / "none") is None
    for step in (8, 64, 128, 1_000_000):
        write(tmp_path, step)
    (tmp_path / ".work" / "checkpoint-2000000").mkdir()
    (tmp_path / ".old-step-3000000").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-1000000"
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-000008", "step-000064", "step-000128", "step-1000000"]


def test_the_same_step_again_replaces_it(tmp_path):
    write(tmp_path, 8, "first")
    again = write(tmp_path, 8, "second")
    assert (again / "optimizer.pt").read_text() == "second"
    assert len(all_checkpoints(tmp_path)) == 1


def test_remove_old_keeps_the_latest(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    remove_old(tmp_path, 2)
    assert [p.name for p in all_checkpoints(tmp_path)] == ["step-000003", "step-000004"]
    assert not list(tmp_path.glob(".old-*"))


class Uploads:
    """Stands for an Uploader that has uploaded nothing yet."""

    def add(self, *names):
        pass


def test_pruning_at_a_url_goes_by_its_own_records(folder, tmp_path):
    """A checkpoint or adapter that is still being uploaded supersedes nothing; an outage stops nothing."""
    for name in ("step-000003", "step-000006", "step-000009"):
        for file in ("optimizer.pt", "files.json"):
            folder.write_bytes(f"checkpoints/{name}/{file}", b"{}")
    folder.delete(["checkpoints/step-000009/files.json"])
    for name in ("step-000004", "step-000008"):
        folder.write_bytes(f"best/{name}/adapter_model.safetensors", b"")
    folder.write_json("best.json", {"folder": "best/step-000004"})
    remote = Remote(folder, tmp_path, Uploads())
    remote.prune(keep=1)
    assert {name.split("/")[1] for name in folder.files("checkpoints")} == {"step-000006", "step-000009"}
    assert {name.split("/")[1] for name in folder.files("best")} == {"step-000004", "step-000008"}
    folder.write_json("best.json", {"folder": "best/step-000008"})
    remote.prune(keep=1)
    assert {name.split("/")[1] for name in folder.files("best")} == {"step-000008"}


def test_an_outage_of_the_store_does_not_end_the_training(tmp_path):
    class Unreachable:
        def files(self, under):
            raise RunError("s3://bucket/run: can't be reached")

        def is_file(self, name):
            raise RunError("s3://bucket/run: can't be reached")

    remote = Remote(Unreachable(), tmp_path, Uploads())
    remote.prune(keep=1)
    assert not remote.stop_requested()
