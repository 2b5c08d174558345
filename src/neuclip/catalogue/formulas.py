"""Lines of formulas and facts that several methods share, in ASCII."""

INNER = """\
  g_i      = mean over j != i of exp((s_ij - s_ii) / tau)       all other samples
"""
ROBUST = (
    INNER
    + """\
  loss     = tau/2 * mean_i [ log(eps + g1_i) + log(eps + g2_i) ] + rho * tau
"""
)
WITHOUT_TAU = (
    INNER
    + """\
  loss     = 1/2 * mean_i [ log(eps + g1_i) + log(eps + g2_i) ]
"""
)
AVERAGE = """\
  estimate : u_i = (1 - gamma_t) u_i + gamma_t g^_i, one per image and per text; u_i = g^_i at the
             first visit; the gradient of exp(-alpha_i) (eps + g^_i), alpha_i = log(eps + u_i)"""
AVERAGE_STATE = "2 numbers per sample: 8 bytes"
