"""One step of block K-BFGS as plain NumPy loops, pair after pair. No JAX: what we compare with."""

import numpy as np
import reference

from kfqn_optax.sketch import signs


def damped_bfgs(H, s, y, powell):
    """Powell's damping, then BFGS; H and whether the damping acted."""
    sy, yHy = s @ y, y @ H @ y
    if yHy == 0:
        return H, False
    damped = bool(sy <= powell * yHy)
    if damped:
        t = (1 - powell) * yHy / (yHy - sy)
        s = t * s + (1 - t) * (H @ y)
    V = np.eye(len(s)) - np.outer(s, y) / (s @ y)
    return V @ H @ V.T + np.outer(s, s) / (s @ y), damped


def age_of(count, window):
    """How many steps' pairs the elder of two generations holds after so many steps."""
    last, half = (count - 1) % window, window // 2
    return min(count, last + 1 if last >= half else last + 1 + half)


def made_of(steps, d, scale, powell):
    """BFGS from a multiple of the identity; H and how many pairs of the last step were damped."""
    H, damped = scale * np.eye(d), 0
    for S, Y in steps:
        damped = 0
        for s, y in zip(S, Y, strict=True):
            H, by_powell = damped_bfgs(H, s, y, powell)
            damped += by_powell
    return H, damped


class BlockMlp(reference.Mlp):
    """The network of `reference.Mlp` under block K-BFGS; damping, momentum as there.

    Args:
        *args: as for `Mlp`; lr multiplies the step to the minimum.
        pairs: q.
        window: steps that a generation of output pairs grows.
        decay: of A.
        inverses: whether input factors are inverses of A with its damping, not made of pairs.
        **kwargs: as for `Mlp`.
    """

    def __init__(self, *args, pairs=3, window=4, decay=0.9, inverses=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.inverses = inverses
        self.q, self.window, self.decay = pairs, window, decay
        self.remembered = [[] for _ in self.H_g]
        root = np.sqrt(self.damping)
        self.H_a, self.H_g = ([H / root for H in side] for side in (self.H_a, self.H_g))
        self.radius, self.kappa, self.rejected, self.powell_damped, self.judged = None, 1.0, 0, 0, 0

    def step(self, X, T, X_c, T_c):
        """One step on a batch, with curvature from other arrays."""
        root, E, m = np.sqrt(self.damping), signs(len(X_c), self.q), len(X_c)
        _, inputs, cotangents = self.passes(X, T)
        before, seen, g_seen = self.passes(X_c, T_c)
        n, slope, curvature, slope_c, P = self.count, 0.0, 0.0, 0.0, []
        keep = min(self.decay, n / (n + 1))
        batch = self.second_moments(X_c, T_c)
        self.A = (
            batch
            if n == 0
            else [keep * a + (1 - keep) * b for a, b in zip(self.A, batch, strict=True)]
        )
        for i, W in enumerate(self.W):
            G = cotangents[i].T @ inputs[i] / len(X) + self.tau * W
            self.M[i] = self.momentum * self.M[i] + (1 - self.momentum) * G
            M = self.M[i] / (1 - self.momentum ** (n + 1))
            S = E.T @ seen[i] @ self.H_a[i]
            for s in S:
                self.H_a[i], _ = damped_bfgs(self.H_a[i], s, self.A[i] @ s + root * s, 0.2)
            if self.inverses:
                self.H_a[i] = np.linalg.inv(self.A[i] + root * np.eye(len(self.A[i])))
            P.append(self.H_g[i] @ M @ self.H_a[i])
            slope += np.sum(G * P[i])
            curvature += np.sum(M * P[i])
            slope_c += np.sum(g_seen[i].T @ seen[i] / m * P[i])
        if self.radius is None:
            self.radius = 0.005 * abs(before)
        a = min(slope / (self.kappa * curvature), 10.0) * min(self.lr, 1) if slope > 0 else 0.0
        if a * a * curvature > self.radius:
            a = np.sqrt(self.radius / curvature)
        old, new = self.W, [W - a * p for W, p in zip(self.W, P, strict=True)]
        self.W = new
        after, probed, g_probed = self.passes(X_c, T_c)
        for i in range(len(new)):
            S = E.T @ (probed[i] @ new[i].T - seen[i] @ old[i].T)
            Y = E.T @ (g_probed[i] - g_seen[i])
            sizes = np.linalg.norm(E.T @ g_seen[i], axis=1)
            told = [
                (s, y + root * s)
                for s, y, size in zip(S, Y, sizes, strict=True)
                if np.linalg.norm(y) > 100 * np.finfo(float).eps * size
            ]
            if told:
                steps = self.remembered[i]
                steps.append(tuple(zip(*told, strict=True)))
                known = steps[-age_of(len(steps), self.window) :]
                self.H_g[i], damped = made_of(known, len(S[0]), 1 / root, 0.2)
                self.powell_damped += damped
        accepted = self.judge(a, a * a * curvature, slope_c, before, after)
        self.W = new if accepted else old
        self.count += 1
        return [-a * p * accepted for p in P]

    def judge(self, a, squared, slope, before, after):
        """Whether the step is taken; radius and kappa change."""
        if a == 0:
            return False
        change, linear = after - before, -a * slope
        predicted = linear + self.kappa * squared / 2
        accepted = change <= 0.1 * abs(before)
        ratio = change / predicted if predicted < 0 else 1.0
        radius = self.radius
        if ratio < 0.25 and squared > 0.5 * self.radius:
            radius /= 1.5
        elif ratio > 0.6 and predicted < 0 and squared > 0.8 * self.radius:
            radius *= 1.5
        radius = max(radius, min(1.5 * self.radius, 0.02 * abs(before)))
        if not accepted:
            radius = min(self.radius, squared) / 4
        seen = np.clip(2 * (change - linear) / squared, self.kappa / 10, self.kappa * 10)
        decay = min(0.8, self.judged / (self.judged + 1))
        self.judged += 1
        self.kappa = np.exp(decay * np.log(self.kappa) + (1 - decay) * np.log(seen))
        self.radius, self.rejected = radius, self.rejected + (not accepted)
        return accepted
