"""Experiments: what `configs/*.py` ask for, from a config file to a figure.

One way through the rooms, left to right:

    config  ->  datasets, problems, optimizers  ->  steps  ->  train  ->  workdir, plots

* `config`: every key a config file may have, its meaning and its range.
* `datasets`: a problem's images or text, train and test.
* `problems`: a problem's network and its losses.
* `optimizers`: the Optax transformation that a config names.
* `devices`: which devices a run uses, and what lies on which.
* `steps`: what runs on the device: training step, warm start, evaluation.
* `train`: the loop over epochs and the clock.
* `losses`: the losses of the steps, and the end of a run that diverges.
* `stop`: SIGTERM and Ctrl-C.
* `checkpoints`: where a run goes on after a kill. `leaves` makes named arrays of its state,
  `fingerprint` says what run they are of, `sums` whether their files are sound.
* `progress`: what a person sees meanwhile.
* `workdir`: the files of a run, written and read back; `atomic` writes one whole or not at all,
  `events` those of TensorBoard.
* `plots`: figures and the table.
* `cli`: the commands `kfqn-train` and `kfqn-compare`.

The optimizers are used through their public names only, as any other program would.
"""
