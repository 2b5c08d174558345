"""Secrets in addresses and commands reach no file and no terminal, whatever command is given."""

import pytest

from integration.conftest import SMALLEST
from neuclip.cli.app import main
from shard_server import serving

SECRET = "5eCr3t"
SIGNED = {
    "S3": f"X-Amz-Credential=AK{SECRET}%2F20260101&X-Amz-Signature={SECRET}",
    "GCS": f"X-Goog-Credential=me%40{SECRET}&X-Goog-Signature={SECRET}",
    "Azure": f"sv=2024-05-04&se=2026-01-01&sr=b&sp=r&sig={SECRET}%3D",
    "Hugging Face": f"Expires=17&Policy={SECRET}_&Signature={SECRET}~-&Key-Pair-Id=K{SECRET}",
}


@pytest.fixture(scope="module")
def server(demo_dir):
    with serving(demo_dir) as found:
        yield found


def source(server, form, split="train"):
    (shard, *_) = sorted((server.folder / split).glob("*.tar"))
    place = f"{split}/{shard.name}"
    if form in SIGNED:
        return f"{server.url}/{place}?{SIGNED[form]}"
    header = f"Authorization: Bearer {SECRET}{SECRET}" if form == "header" else "A: b"
    before = f"HF_TOKEN={SECRET} " if form == "environment" else ""
    return f"pipe:{before}cat {server.folder / place} # -H '{header}'"


@pytest.fixture
def leaves_nothing(tmp_path, capfd):
    """Runs command lines, and looks for the secret in all they have written and said."""

    def run(*words):
        code = main(list(words))
        said = "".join(capfd.readouterr())
        assert code == 0, said
        found = [line for line in said.splitlines() if SECRET in line]
        for path in tmp_path.rglob("*"):
            if SECRET in str(path) or (path.is_file() and SECRET.encode() in path.read_bytes()):
                found.append(str(path.relative_to(tmp_path)))
        assert found == []

    return run


def with_a_missing_shard(address):
    return (
        address if address.startswith("pipe:") else f"{address}::{address.replace('.tar', 'x.tar')}"
    )


@pytest.mark.parametrize("form", ["Azure", "header", "environment"])
def test_tools_for_data(server, tmp_path, leaves_nothing, form):
    """The address of a shard that is missing is in pages, reports and messages."""
    data = with_a_missing_shard(source(server, form))
    common = ["--cache-dir", str(tmp_path / "cache"), "--allow-pipe"]
    page = str(tmp_path / "page.html")
    leaves_nothing("data", "inspect", data, *common, "--max-samples", "4", "--out", page)
    leaves_nothing("data", "pack", data, *common, "--out", str(tmp_path / "packed"))


def test_a_run_and_what_is_made_of_it(server, tmp_path, leaves_nothing, monkeypatch):
    """Training, evaluation, report and export, of signed addresses and with the hub's token."""
    monkeypatch.setenv("HF_TOKEN", f"hf_{SECRET}")
    read = ["--cache-dir", str(tmp_path / "cache"), "--workers", "0", "--device", "cpu"]
    train = with_a_missing_shard(source(server, "S3"))
    run = str(tmp_path / "logs" / "run")
    leaves_nothing(
        "train", "--train-data", train,
        "--val-data", source(server, "GCS", "unseen_face_development"),
        "--model", SMALLEST, "--batch-size", "16", "--train-num-samples", "32", "--epochs", "1",
        "--warmup", "1", "--log-every-n-steps", "1", "--max-bad-fraction", "1",
        "--logs", str(tmp_path / "logs"), "--name", "run", *read,
    )  # fmt: skip
    other = source(server, "Hugging Face", "unseen_character_test")
    leaves_nothing("eval", run, "--val-data", other, *read)
    leaves_nothing("report", run, "--out", str(tmp_path / "report.html"))
    leaves_nothing("export", run, "--out", str(tmp_path / "export"))
    kept = (tmp_path / "logs" / "run" / "config.yaml").read_text()
    assert ".tar?***" in kept  # the rest of the address is there, to know the data by
