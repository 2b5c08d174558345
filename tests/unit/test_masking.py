import logging

import pytest

from neuclip import console
from neuclip.config.validation import validate
from neuclip.masking import mask, mask_tree

SIGNED = "https://bucket.s3.amazonaws.com/a/{0..7}.tar?X-Amz-Signature=5eC&X-Amz-Expires=9"


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        (SIGNED, "https://bucket.s3.amazonaws.com/a/{0..7}.tar?***"),
        (f"{SIGNED}: HTTP 403", "https://bucket.s3.amazonaws.com/a/{0..7}.tar?***: HTTP 403"),
        ("http://me:pa55@h:80/x.tar, http://b/y?z", "http://***@h:80/x.tar, http://b/y?***"),
        ("a::https://h/x.tar?sig=1::b", "a::https://h/x.tar?***::b"),
        ("{https://h/a?s=1,https://h/b?s=2}", "{https://h/a?***,https://h/b?***}"),
        ("curl -H 'Authorization: Bearer abcdef123'", "curl -H 'Authorization: Bearer ***'"),
        ("pipe:curl -H 'Authorization: tok.en' u", "pipe:curl -H 'Authorization: ***' u"),
        ("pipe:AWS_SECRET_ACCESS_KEY=ab/c aws s3 cp", "pipe:AWS_SECRET_ACCESS_KEY=*** aws s3 cp"),
        ("pipe:wget --password=x1 --user=me u", "pipe:wget --password=*** --user=me u"),
        ("token hf_abcdefghijklmnopqrstuv", "token ***"),
        ("az://c.blob/x.tar?sv=2024&sig=ab%3D", "az://c.blob/x.tar?***"),
        ("gs://b/{0..9}.tar?X-Goog-Signature=ab::c", "gs://b/{0..9}.tar?***::c"),
        ("pipe:curl -H 'X-Auth-Token: s3c' u", "pipe:curl -H 'X-Auth-Token: ***' u"),
        ('pipe:curl -H "Cookie: a=b; c=d" u', 'pipe:curl -H "Cookie: ***" u'),
        ("pipe:curl -u me:pa55 u", "pipe:curl -u *** u"),
        ("pipe:curl --user='me:pa55' u", "pipe:curl --user='***' u"),
        ("pipe:get --access-token s3c --n 4 u", "pipe:get --access-token *** --n 4 u"),
        ("pipe:HF_TOKEN=s3c get u", "pipe:HF_TOKEN=*** get u"),
        ("get --access-token s3c u", "get --access-token *** u"),  # with no other sign of a secret
        ("curl -H 'Authorization: token ghx_1' u", "curl -H 'Authorization: token ***' u"),
        (
            "-H 'Authorization: AWS4-HMAC-SHA256 Credential=A/b, Signature=5eC' u",
            "-H 'Authorization: AWS4-HMAC-SHA256 ***' u",
        ),
        ("pipe:curl -ume:pa55 u", "pipe:curl -u*** u"),
        ("pipe:curl --proxy-user me:pa55 u", "pipe:curl --proxy-user *** u"),
        ("pipe:curl --cookie 'id=5; k=6' u", "pipe:curl --cookie *** u"),
        ("pipe:curl -b id=5 u", "pipe:curl -b *** u"),
        ("got eyJhbGciOiJI.eyJzdWIi.s1g_n-x for it", "got *** for it"),
        (f"ghp_{'a' * 36} and glpat-{'b' * 20}", "*** and ***"),
        (f"got github_pat_{'a' * 30}", "got ***"),
    ],
)  # fmt: skip
def test_secrets(text, masked):
    assert mask(text) == masked
    assert mask(masked) == masked


@pytest.mark.parametrize(
    "text",
    [
        "/data/what?/0.tar", "lr=1e-3", "tokens=77", "epoch 1/2  loss 0.3?", "http://127.0.0.1:8765/",
        "basic training", "pipe:sort -u x", "a token is", "token 'x' of 77", "-u me",
        "s3://bucket/{0..9}.tar", "caption_key: title", "sort -b x", "-b 'x'", "eyJ.",
    ],
)  # fmt: skip
def test_other_text_stays(text):
    assert mask(text) == text


def test_kept_settings():
    tree = {"data": {"train_data": f"/local::{SIGNED}"}, "evaluation": {"val_data": SIGNED}}
    text = validate(tree, "test").to_yaml()
    assert "5eC" not in text and text.count("?***") == 2
    assert mask_tree({"a": [SIGNED, 1, None]}) == {"a": [mask(SIGNED), 1, None]}


def test_terminal_and_logs(capsys):
    console.write(f"cannot read {SIGNED}")
    assert "5eC" not in capsys.readouterr().err
    record = logging.LogRecord("neuclip", 20, "", 0, "%s: gone", (SIGNED,), None)
    assert "5eC" not in console.MessageFormatter().format(record)
