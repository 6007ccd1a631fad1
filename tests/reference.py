"""Steps of the family as plain NumPy loops, written from the papers. No JAX: what we compare with.

Everything is as in the paper: W is [d_out, d_in] with the bias as last column, s and y are new
minus old, one layer after the other. `Mlp` carries weights, momentum and curvature; `Mlp.step`
takes one step on a batch and returns every intermediate array by name. `Kfqn` is the later paper's
method on the same network. Inputs may be sequences, [examples, positions, d_in]: the network acts
on each position, and the loss is summed over them.
"""

import numpy as np

MU1, DECAY, TOLERANCE = 0.2, 0.9, 1e-4


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


class Mlp:
    """A multi-layer perceptron under K-BFGS, float64.

    Args:
        weights: a list of [d_out, d_in + 1].
        activations: "relu" or "linear" for each layer.
        loss: "bce" (with logits) or "half_mse", summed over outputs, mean over examples.
        lr: learning rate.
        damping: lambda.
        weight_decay: tau.
        momentum: decay of M.
        output_memory: pairs that the output factor is the product of; None for all of them.
        input_memory: the same for the input factor, which then starts from the identity.
    """

    def __init__(
        self, weights, activations, loss, lr, damping, weight_decay=1e-5, momentum=0.9,
        output_memory=None, input_memory=None,
    ):  # fmt: skip
        self.output_memory, self.input_memory = output_memory, input_memory
        self.pairs_g, self.pairs_a = [[] for _ in weights], [[] for _ in weights]
        self.W = [w.copy() for w in weights]
        self.activations, self.loss_name = activations, loss
        self.lr, self.damping, self.tau, self.momentum = lr, damping, weight_decay, momentum
        self.M = [np.zeros_like(w) for w in weights]
        self.s = [np.zeros(w.shape[0]) for w in weights]
        self.y = [np.zeros(w.shape[0]) for w in weights]
        self.H_g = [np.eye(w.shape[0]) for w in weights]
        self.H_a = [np.eye(w.shape[1]) for w in weights]
        self.A = None
        self.count = 0

    def passes(self, X, T):
        """Loss; and by layer, a row an example and position: inputs with a trailing 1, and the
        gradient of the example's loss at h."""
        examples = len(X)
        X, T = X.reshape(-1, X.shape[-1]), T.reshape(-1, T.shape[-1])
        a, inputs, outputs = X, [], []
        for W, activation in zip(self.W, self.activations, strict=True):
            a = np.hstack([a, np.ones((len(a), 1))])
            inputs.append(a)
            h = a @ W.T
            outputs.append(h)
            a = np.maximum(h, 0) if activation == "relu" else h
        if self.loss_name == "bce":
            losses = np.maximum(a, 0) - a * T + np.log1p(np.exp(-np.abs(a)))
            g = sigmoid(a) - T
        else:
            losses, g = 0.5 * (a - T) ** 2, a - T
        cotangents = [None] * len(self.W)
        for i in reversed(range(len(self.W))):
            if self.activations[i] == "relu":
                g = g * (outputs[i] > 0)
            cotangents[i] = g
            g = g @ self.W[i][:, :-1]
        return losses.sum() / examples, inputs, cotangents

    def second_moments(self, X, T):
        _, inputs, _ = self.passes(X, T)
        return [a.T @ a / len(X) for a in inputs]

    def warm_start(self, batches):
        moments = [self.second_moments(X, T) for X, T in batches]
        self.start([np.mean(layer, axis=0) for layer in zip(*moments, strict=True)])

    def start(self, A):
        self.A = A
        self.H_a = [np.linalg.inv(a + np.sqrt(self.damping) * np.eye(len(a))) for a in A]

    def step(self, X, T):
        """One step; returns a list, by layer, of dicts of every array that the step made."""
        mu2 = np.sqrt(self.damping)
        loss, inputs, cotangents = self.passes(X, T)
        if self.A is None:
            self.start(self.second_moments(X, T))
        elif self.count > 0:
            new = self.second_moments(X, T)
            self.A = [DECAY * a + (1 - DECAY) * b for a, b in zip(self.A, new, strict=True)]
        records = []
        for i, W in enumerate(self.W):
            G = cotangents[i].T @ inputs[i] / len(X)
            self.M[i] = self.momentum * self.M[i] + (1 - self.momentum) * (G + self.tau * W)
            records.append(
                {
                    "loss": loss,
                    "G": G,
                    "M": self.M[i],
                    "A": self.A[i],
                    "direction": -self.H_g[i] @ self.M[i] @ self.H_a[i],
                    "a_mean": inputs[i].mean(axis=0),
                    "g_mean": cotangents[i].mean(axis=0),
                    "h_mean": W @ inputs[i].mean(axis=0),
                }
            )
        self.W = [w + self.lr * r["direction"] for w, r in zip(self.W, records, strict=True)]
        _, inputs, cotangents = self.passes(X, T)
        for i, r in enumerate(records):
            s = self.W[i] @ inputs[i].mean(axis=0) - r["h_mean"]
            y = cotangents[i].mean(axis=0) - r["g_mean"]
            self.s[i] = DECAY * self.s[i] + (1 - DECAY) * s
            self.y[i] = DECAY * self.y[i] + (1 - DECAY) * y
            u, v, by_powell, by_second = damp(self.s[i], self.y[i], self.H_g[i], mu2)
            self.H_g[i], H_g_status = self.learn_output(i, u, v, r["g_mean"])
            u_a = self.H_a[i] @ r["a_mean"]
            v_a = self.A[i] @ u_a + mu2 * u_a
            self.H_a[i], H_a_status = bfgs(self.H_a[i], u_a, v_a, r["a_mean"])
            r.update(
                W=self.W[i], s=self.s[i], y=self.y[i], s_damped=u, y_damped=v, H_g=self.H_g[i],
                H_g_status=H_g_status, H_a=self.H_a[i], H_a_status=H_a_status, H_a_s=u_a,
                H_a_y=v_a, powell=by_powell, second=by_second,
            )  # fmt: skip
        self.count += 1
        return records

    def learn_output(self, i, u, v, reference, tolerance=TOLERANCE):
        if self.output_memory is None:
            return bfgs(self.H_g[i], u, v, reference, tolerance)
        return limited(self.pairs_g[i], self.output_memory, u, v, reference, tolerance)


class Kfqn(Mlp):
    """The same network under KF-QN: A from the batch alone, damping shifted, lambda split by T.

    Args:
        *args: as for `Mlp`.
        split: "sqrt" or "sqrt_t".
        **kwargs: as for `Mlp`.
    """

    def __init__(self, *args, split="sqrt_t", **kwargs):
        super().__init__(*args, **kwargs)
        self.split = split

    def dampings(self, positions):
        root, T = np.sqrt(self.damping), positions if self.split == "sqrt_t" else 1
        return root * np.sqrt(T), root / np.sqrt(T)

    def start(self, A, positions=1):
        self.A = A
        if self.input_memory is None:
            lambda_a, _ = self.dampings(positions)
            self.H_a = [np.linalg.inv(a + lambda_a * np.eye(len(a))) for a in A]

    def step(self, X, T):
        """One step; returns a list, by layer, of dicts of what the step made."""
        loss, inputs, cotangents = self.passes(X, T)
        examples, positions = len(X), len(inputs[0]) // len(X)
        lambda_a, lambda_g = self.dampings(positions)
        if self.A is None:
            self.start(self.second_moments(X, T), positions)
        records = []
        for i, W in enumerate(self.W):
            G = cotangents[i].T @ inputs[i] / examples
            self.M[i] = self.momentum * self.M[i] + (1 - self.momentum) * (G + self.tau * W)
            a_mean, g_mean = inputs[i].mean(axis=0), cotangents[i].mean(axis=0)
            u_a = self.H_a[i] @ a_mean
            A_u = sum(a * (a @ u_a) for a in inputs[i]) / examples
            records.append(
                {
                    "loss": loss,
                    "direction": -self.H_g[i] @ self.M[i] @ self.H_a[i],
                    "a_mean": a_mean,
                    "g_mean": g_mean,
                    "H_a_s": u_a,
                    "H_a_y": A_u + lambda_a * u_a,
                }
            )
        old, self.W = (
            self.W,
            [w + self.lr * r["direction"] for w, r in zip(self.W, records, strict=True)],
        )
        _, inputs, cotangents = self.passes(X, T)
        for i, r in enumerate(records):
            s = self.W[i] @ inputs[i].mean(axis=0) - old[i] @ r["a_mean"]
            y = cotangents[i].mean(axis=0) - r["g_mean"]
            self.s[i] = DECAY * self.s[i] + (1 - DECAY) * s
            self.y[i] = DECAY * self.y[i] + (1 - DECAY) * y
            u, v = self.s[i], self.y[i]
            Hy = self.H_g[i] @ v
            by_powell = bool(u @ v <= MU1 * (v @ Hy))
            if by_powell:
                t = (1 - MU1) * (v @ Hy) / (v @ Hy - u @ v)
                u = t * u + (1 - t) * Hy
            v = v + lambda_g * u
            self.H_g[i], H_g_status = self.learn_output(i, u, v, r["g_mean"], tolerance=0)
            if self.input_memory is None:
                self.H_a[i], _ = bfgs(self.H_a[i], r["H_a_s"], r["H_a_y"], r["a_mean"], 0)
            else:
                memory = self.pairs_a[i], self.input_memory
                self.H_a[i], _ = limited(*memory, r["H_a_s"], r["H_a_y"], r["a_mean"], 0)
            r.update(
                W=self.W[i], s=self.s[i], y=self.y[i], H_g=self.H_g[i], H_a=self.H_a[i],
                H_g_status=H_g_status, powell=by_powell,
            )  # fmt: skip
        self.count += 1
        return records


def limited(pairs, memory, s, y, reference, tolerance=TOLERANCE):
    """Appends a pair to the list, drops the oldest beyond the memory; their product, the status."""
    _, status = bfgs(np.eye(len(s)), s, y, reference, tolerance)
    if status == 0:
        pairs.append((s, y))
        del pairs[:-memory]
    H = np.eye(len(s))
    for pair in pairs:
        H, _ = bfgs(H, *pair, reference, 0)
    return H, status


def damp(s, y, H, mu2, mu1=MU1):
    """Double damping: the pair, and whether each of the two dampings acted."""
    Hy = H @ y
    by_powell = bool(y @ Hy > 0 and s @ y <= mu1 * (y @ Hy))
    if by_powell:
        t = (1 - mu1) * (y @ Hy) / (y @ Hy - s @ y)
        s = t * s + (1 - t) * Hy
    by_second = bool(s @ s > 0 and s @ y <= mu2 * (s @ s))
    if by_second:
        if mu2 > 1:  # where the paper's t is no weight; the same s.y by a multiple of s
            y = y + (mu2 - s @ y / (s @ s)) * s
        else:
            t = (1 - mu2) * (s @ s) / (s @ s - s @ y)
            y = t * y + (1 - t) * s
    return s, y, by_powell, by_second


def bfgs(H, s, y, reference, tolerance=TOLERANCE):
    """The product form of the BFGS update of an inverse, and the authors' status code."""
    if not s @ y > 0:
        return H, 1
    if s @ y <= tolerance * (s @ s) * np.linalg.norm(reference):
        return H, 2
    left = np.eye(len(s)) - np.outer(s, y) / (s @ y)
    return left @ H @ left.T + np.outer(s, s) / (s @ y), 0
