"""Elementary functions with all their digits: device functions, as in `formula`."""

from mapo_kernels._triton import constant, jit, tl

# Kernels compute in float32, where short series do; on torch tensors they serve float64, too.
FLOAT32 = constant(True)


@jit
def exp(x):
    """e^x within about one rounding, whatever the size of x.

    A GPU's float32 exponential is 2^(x log2 e) with the product rounded: by |x| = 50 more than a
    digit is gone. Here x = n ln 2 + r with ln 2 in two parts, then e^r 2^n.
    """
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(n, -1.42860682030941723e-06, tl.fma(n, -0.693145751953125, x))
    return tl.where(tl.abs(x) < 80.0, tl.exp(r) * tl.exp2(n), tl.exp(x))


@jit
def k3(d, exp_d):
    """The estimate e^d - d - 1, without cancellation near 0, where a KL spends its life."""
    # 2 / (k + 2)! d^k up to k = 11: below one float64 rounding for |d| < 0.25; k = 5 for float32.
    if FLOAT32:
        series = tl.fma(d, 0.0003968253968253968, 0.002777777777777778)
    else:
        series = tl.fma(d, 3.2118087673643227e-10, 4.17535139757362e-09)
        series = tl.fma(series, d, 5.010421677088344e-08)
        series = tl.fma(series, d, 5.511463844797178e-07)
        series = tl.fma(series, d, 5.5114638447971785e-06)
        series = tl.fma(series, d, 4.96031746031746e-05)
        series = tl.fma(series, d, 0.0003968253968253968)
        series = tl.fma(series, d, 0.002777777777777778)
    series = tl.fma(series, d, 0.016666666666666666)
    series = tl.fma(series, d, 0.08333333333333333)
    series = tl.fma(series, d, 0.3333333333333333)
    series = tl.fma(series, d, 1.0)
    return tl.where(tl.abs(d) < 0.25, 0.5 * d * d * series, exp_d - d - 1.0)


@jit
def log1p(x):
    """log(1 + x) for x >= 0 within about one rounding, however small x is."""
    # 2 artanh(z) / z up to z^22: below one float64 rounding for z <= 1/5, which is x <= 1/2; for
    # float32 up to z^10.
    z = x / (2.0 + x)
    zz = z * z
    if FLOAT32:
        series = tl.fma(zz, 1.0 / 11.0, 1.0 / 9.0)
    else:
        series = tl.fma(zz, 1.0 / 23.0, 1.0 / 21.0)
        series = tl.fma(series, zz, 1.0 / 19.0)
        series = tl.fma(series, zz, 1.0 / 17.0)
        series = tl.fma(series, zz, 1.0 / 15.0)
        series = tl.fma(series, zz, 1.0 / 13.0)
        series = tl.fma(series, zz, 1.0 / 11.0)
        series = tl.fma(series, zz, 1.0 / 9.0)
    series = tl.fma(series, zz, 1.0 / 7.0)
    series = tl.fma(series, zz, 1.0 / 5.0)
    series = tl.fma(series, zz, 1.0 / 3.0)
    series = tl.fma(series, zz, 1.0)
    return tl.where(x < 0.5, 2.0 * z * series, tl.log(1.0 + x))


@jit
def clamp(x, low, high):
    """`x` within [low, high]; NaN stays NaN."""
    return tl.clamp(x, low, high, propagate_nan=tl.PropagateNan.ALL)
