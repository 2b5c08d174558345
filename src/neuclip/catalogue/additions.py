"""Losses that a run adds to that of any method. Imports no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Addition:
    """A loss beside the method's.

    Attributes:
        flag: with an argument that asks for it.
        summary: one line for lists.
        state: what it adds to the state of a run.
        formula: ASCII text.
        paper: what to cite.
    """

    flag: str
    summary: str
    state: str
    formula: str
    paper: str


ADDITIONS = (
    Addition(
        flag="--token-weight 1",
        summary="the image tower also predicts the tokens of its caption (SuperCLIP)",
        state="a linear head, width x vocabulary, and how many captions had each token",
        formula="""\
  z_i      = W LayerNorm(p_i) + b        p_i: mean of the patch features, before the projection
  w_c      = log( (n + 1) / (n_c + 1) )  n captions seen so far, n_c of them with token c
  t_ic     = w_c / (their sum over the tokens of caption i), for these tokens; 0 for others
  loss     = that of the method + token_weight * mean_i -sum_c t_ic log softmax(z_i)_c
             all token ids count, padding too: what every caption has, has w_c = 0""",
        paper="Zhao et al., SuperCLIP: CLIP with Simple Classification Supervision, NeurIPS 2025 "
        "(arXiv 2512.14480)",
    ),
)
