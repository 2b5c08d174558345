"""`neuclip push` against a local server with the hub's routes for uploads."""

import shutil

import pytest
import torch
from huggingface_hub.utils import _http, are_progress_bars_disabled

import neuclip
from hub_server import serving
from hub_uploads import UploadHandler, UploadHub
from neuclip.cli.app import main
from neuclip.errors import UserError
from neuclip.export.exported_files import ExportedFiles, read_exported_files
from neuclip.export.push import Destination, for_hub

pytestmark = pytest.mark.filterwarnings(  # of huggingface_hub's own upload
    "ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning"
)

TOKEN = "not-like-a-token"
NAME = "me/my-clip"
LARGE = {"model.safetensors", "open_clip_model.safetensors"}


@pytest.fixture(scope="module")
def written(tmp_path_factory, write_repository):
    """An export for open_clip and transformers."""
    folder = tmp_path_factory.mktemp("export")
    source = write_repository(folder / "tiny-vit")
    assert main(["export", str(source), "--format", "hf", "--out", str(folder / "mine")]) == 0
    return folder / "mine"


@pytest.fixture
def export(written, tmp_path):
    return shutil.copytree(written, tmp_path / "mine")


@pytest.fixture
def hub(set_hub, monkeypatch):
    """A hub that knows the token; large files go by the plain protocol, retries do not wait."""
    monkeypatch.setattr(_http.time, "sleep", lambda _: None)
    fake = UploadHub(token=TOKEN)
    with serving(fake, UploadHandler):
        set_hub("ENDPOINT", fake.address)
        set_hub("HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield fake


def pushed(export, *flags):
    return main(["push", str(export), NAME, *flags])


def on_disk(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_was_pushed_can_be_loaded(hub, export, capsys, tmp_path):
    (export / "notes.txt").write_text("my own")
    assert pushed(export) == 0
    shown = capsys.readouterr()
    assert "left out, not of the export: notes.txt" in shown.err
    assert f'neuclip.load("hf-hub:{NAME}")' in shown.out
    assert TOKEN not in shown.out + shown.err
    there = hub.branches[NAME]["main"]
    expected = {name: c for name, c in on_disk(export).items() if name != "notes.txt"}
    card = there["README.md"].decode()
    for name, content in expected.items():
        assert there[name] == content or name == "README.md", name
    assert there.keys() == {*expected, ".gitattributes"}
    assert f'create_model_and_transforms("hf-hub:{NAME}")' in card
    assert f'CLIPModel.from_pretrained("{NAME}")' in card
    assert "local-dir" not in card and '"mine"' not in card
    assert NAME not in hub.private
    words = ["a cat", "two dogs"]
    ours, theirs = (
        neuclip.load(which, device="cpu", workers=0).embed_texts(words)
        for which in (export, f"hf-hub:{NAME}")
    )
    assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


def test_a_private_repository_and_a_branch(hub, export, capsys):
    assert pushed(export, "--private", "--revision", "epoch-3", "--message", "Third epoch") == 0
    assert NAME in hub.private
    assert hub.branches[NAME]["main"].keys() == {".gitattributes"}
    assert hub.branches[NAME]["epoch-3"].keys() >= LARGE
    assert hub.messages == ["Third epoch"]
    assert f'neuclip.load("hf-hub:{NAME}@epoch-3")' in capsys.readouterr().out


def test_private_is_refused_for_a_public_repository(hub, export, capsys):
    hub.make(NAME)
    assert pushed(export, "--private") == 2
    assert "exists and is public: make it private in its settings" in capsys.readouterr().err
    assert hub.branches[NAME]["main"].keys() == {".gitattributes"} and not hub.large


def test_progress_bars_of_the_library_come_back(hub, export):
    assert pushed(export) == 0
    assert not are_progress_bars_disabled()


def test_pushing_again(hub, export, capsys):
    hub.make(NAME, {"samples.png": b"theirs"})
    assert pushed(export) == 0
    assert f"other files stay in {NAME}: samples.png" in capsys.readouterr().err
    hub.sent.clear()
    assert pushed(export) == 0
    assert "nothing had changed since" in capsys.readouterr().out
    assert "large" not in hub.sent and "commit" not in hub.sent
    assert hub.branches[NAME]["main"]["samples.png"] == b"theirs"


def test_a_dry_run_sends_nothing(hub, export, capsys, set_hub, monkeypatch):
    (export / "notes.txt").write_text("my own")
    set_hub("HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN")
    assert pushed(export, "--dry-run", "--private", "--revision", "v2") == 0
    shown = capsys.readouterr()
    assert f"{hub.address}/{NAME}, branch v2, private: 'Upload mine with neuclip'" in shown.out
    for name, size in for_hub(read_exported_files(export), NAME).files.items():
        assert any(line.split()[:2] == [name, f"{size:,}"] for line in shown.out.splitlines())
    assert "nothing was sent (--dry-run)" in shown.out
    assert "notes.txt" in shown.err and "notes.txt" not in shown.out
    assert not hub.sent and not hub.requests


@pytest.mark.parametrize("status", [403, 503])
def test_a_failure_in_the_middle_commits_nothing(hub, export, capsys, status):
    hub.make(NAME, {"README.md": b"older", "model.safetensors": b"older"})
    before = dict(hub.branches[NAME]["main"])
    hub.refusals["large"] = status, ""
    hub.refused_after = 1
    assert pushed(export) == 2
    assert len(hub.large) == 1
    assert hub.branches[NAME]["main"] == before and "commit" not in hub.sent
    assert "files that arrived are not sent again" in capsys.readouterr().err
    hub.refusals.clear()
    hub.sent.clear()
    assert pushed(export) == 0
    assert hub.sent.count("large") == 1  # the other one had arrived
    assert hub.branches[NAME]["main"]["model.safetensors"] != b"older"


@pytest.mark.parametrize(
    ("route", "status", "said", "expected"),
    [
        ("create", 403, f"no rights of {TOKEN} under this namespace", "needs write access to me ("),
        ("create", 500, "", "HTTP 500: the hub is out of order. The branch is as it was"),
        ("preupload", 404, "", "is gone: check OWNER/NAME and --revision"),
        ("preupload", 403, "read-only token", "HTTP 403 (read-only token)"),
        ("commit", 409, "", "another change came in between: push again"),
        ("commit", 412, "", "another change came in between: push again"),
        ("commit", 400, "Invalid names", "HTTP 400 (Invalid names)"),
        ("commit", 504, "", "HTTP 504: the hub is out of order"),
        ("commit", 418, "", "HTTP 418: the hub refused it"),
    ],
)
def test_refusals_name_the_remedy(hub, export, capsys, route, status, said, expected):
    hub.refusals[route] = status, said
    assert pushed(export) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "neuclip: " in line]
    assert expected in line and line.endswith("files that arrived are not sent again.")
    assert ("Nothing was committed" in line) == (status < 500)
    assert TOKEN not in line and f"{hub.address}/{NAME}" in line
    assert all(b.keys() == {".gitattributes"} for b in hub.branches.get(NAME, {}).values())


def test_a_token_that_is_not_valid(hub, export, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "expired-thing")
    assert pushed(export) == 2
    message = capsys.readouterr().err
    assert "the access token is not valid: give another (HF_TOKEN, or `hf auth login`" in message
    assert f"{hub.address}/settings/tokens" in message and "expired-thing" not in message


def test_no_network(hub, export, capsys, set_hub):
    set_hub("ENDPOINT", "http://127.0.0.1:9")
    assert pushed(export) == 2
    assert "Check the connection and HF_ENDPOINT (http://127.0.0.1:9)" in capsys.readouterr().err


def test_a_hub_without_xet(hub, export, capsys, monkeypatch):
    """hf_xet's own error, as version 1.8 words it where the hub answers 404."""
    said = f"Network error: (404 Not Found), domain: {hub.address}/api/models/x/xet-write-token"

    def fail(*_, **__):
        raise ConnectionError(said)

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", fail)
    assert pushed(export) == 2
    assert "a hub without Xet needs HF_HUB_DISABLE_XET=1. The branch is" in capsys.readouterr().err


def test_what_is_said_before_any_request(hub, export, capsys, set_hub, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    assert pushed(export) == 2
    assert "without an access token; give one that may write (HF_TOKEN" in capsys.readouterr().err
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    set_hub("HF_HUB_OFFLINE", True)
    assert pushed(export) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err
    assert not hub.sent and not hub.requests


def test_the_token_of_hf_home(hub, export, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    (tmp_path / "hf").mkdir(exist_ok=True)
    (tmp_path / "hf" / "token").write_text(TOKEN + "\n")
    assert pushed(export) == 0
    assert hub.tokens == {f"Bearer {TOKEN}", None}  # None: the large files' own address


def test_files_that_the_repository_ignores_are_reported(hub, export, capsys):
    hub.make(NAME, {".gitignore": b"*.safetensors\n"})
    hub.ignored = (".safetensors",)
    assert pushed(export) == 2
    message = capsys.readouterr().err
    assert "lacks model.safetensors, open_clip_model.safetensors" in message
    assert "a .gitignore of the repository may exclude it" in message


def test_a_commit_that_cannot_be_looked_at(hub, export, capsys):
    hub.unlisted = True
    assert pushed(export) == 0
    shown = capsys.readouterr()
    assert "pushed, but the files of the commit could not be compared" in shown.err
    assert f"pushed {hub.address}/{NAME}/commit/" in shown.out


def test_folders_that_are_no_exports(tmp_path, export, capsys):
    (tmp_path / "empty").mkdir()
    for folder, said in [
        (tmp_path / "empty", "is not an export (no README.md that lists its files)"),
        (tmp_path / "gone", "does not exist"),
        (export / "README.md", "is a file"),
    ]:
        assert main(["push", str(folder), NAME, "--dry-run"]) == 2
        message = capsys.readouterr().err
        assert said in message and "`neuclip export RUN --format hf --out FOLDER`" in message


def test_changed_files_are_refused(export, tmp_path, capsys):
    (export / "model.safetensors").write_bytes(b"other")
    (export / "config.json").rename(tmp_path / "secret")
    (export / "config.json").symlink_to(tmp_path / "secret")
    assert main(["push", str(export), NAME, "--dry-run"]) == 2
    message = capsys.readouterr().err
    assert "2 files missing or changed since the export (config.json, model.safet" in message


def test_a_card_cannot_name_files_elsewhere(export, tmp_path):
    (tmp_path / "secret").write_text("1234")
    card = (export / "README.md").read_text()
    (export / "README.md").write_text(card.replace("export: ", "export: ../secret 4, "))
    with pytest.raises(UserError, match=r"missing or changed since the export \(\.\./secret"):
        read_exported_files(export)


@pytest.mark.parametrize(
    ("name", "flags", "said"),
    [
        ("my-clip", [], "OWNER/NAME is expected"),
        ("me/my-clip@v2", [], "--revision, not with @"),
        ("me/my clip", [], "me/my clip"),
        ("a/b/c", [], "OWNER/NAME is expected"),
        (NAME, ["--revision", "--force"], "revision"),
        (NAME, ["--revision", "a..b"], "cannot be the name of a branch"),
    ],
)
def test_malformed_names(export, capsys, name, flags, said):
    with_exit = False
    try:
        code = main(["push", str(export), name, "--dry-run", *flags])
    except SystemExit as stop:
        code, with_exit = stop.code, True
    assert code == 2
    assert said in capsys.readouterr().err or with_exit


def test_exports_of_other_formats_say_how_to_get_the_files(tmp_path):
    code = 'x = open_clip.load("mine/open_clip_model.pt")\n'
    files = ExportedFiles(tmp_path, f"# card\n```python\n{code}```\n", {"README.md": 1}, [])
    card = for_hub(files, NAME).card
    assert f'# the files: hf download {NAME} --local-dir "mine"\n{code}' in card
    assert (
        Destination(NAME, "v2").loading(files)
        == f"hf download {NAME} --revision v2 --local-dir DIR"
    )
