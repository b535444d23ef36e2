"""One of RecBole's models as a process that answers experiments.peers; runs in the environment of benchmarks/peers alone.

Requests are JSON objects, one a line, on standard input, with the operation as "do"; each gets one line of JSON.
"""

import json
import os
import sys
import time

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.utils import get_model, get_trainer, init_seed


class Peer:
    """A model of RecBole on atomic files, with its own data loader, optimizer, loss, epoch and evaluator."""

    def start(self, model, folder, name, settings, checkpoint):
        """Load the data and lay the model out, from its checkpoint where there is one."""
        started = time.perf_counter()
        config = Config(model=model, dataset=name, config_dict=settings | {"data_path": folder})
        init_seed(config["seed"], config["reproducibility"])
        parts = data_preparation(config, create_dataset(config))
        self.train, self.parts = parts[0], {"valid": parts[1], "test": parts[2]}
        self.model = get_model(model)(config, self.train.dataset)
        self.trainer = get_trainer(config["MODEL_TYPE"], model)(config, self.model)
        self.checkpoint, self.epochs = checkpoint, 0
        if os.path.exists(checkpoint):
            saved = torch.load(checkpoint, weights_only=False)
            self.model.load_state_dict(saved["model"])
            self.trainer.optimizer.load_state_dict(saved["optimizer"])
            self.epochs = saved["epochs"]
        self.batches = iter(self.train)
        return {
            "seconds": time.perf_counter() - started,
            "targets": len(self.train.dataset),
            "evaluated": {part: len(loader.dataset) for part, loader in self.parts.items()},
            "items": self.train.dataset.item_num - 1,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": len(self.train),
            "epochs": self.epochs,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    def turn(self, steps):
        """Time training steps, as RecBole's trainer takes them."""
        self.model.train()
        started, began = time.perf_counter(), time.process_time()
        for _ in range(steps):
            interaction = next(self.batches, None)
            if interaction is None:
                self.batches = iter(self.train)
                interaction = next(self.batches)
            self.trainer.optimizer.zero_grad()
            loss = self.model.calculate_loss(interaction.to(self.trainer.device))
            if torch.isnan(loss):
                raise ValueError("the loss is NaN")
            loss.backward()
            self.trainer.optimizer.step()
        return {"seconds": time.perf_counter() - started, "cpu": time.process_time() - began}

    def epoch(self):
        """Train one epoch by RecBole's trainer."""
        started = time.perf_counter()
        loss = self.trainer._train_epoch(self.train, self.epochs, show_progress=False)
        self.epochs += 1
        return {"seconds": time.perf_counter() - started, "loss": float(loss)}

    def save(self):
        """Write the checkpoint that a later start goes on from."""
        state = {"model": self.model.state_dict(), "optimizer": self.trainer.optimizer.state_dict()}
        torch.save(state | {"epochs": self.epochs}, self.checkpoint + ".tmp")
        os.replace(self.checkpoint + ".tmp", self.checkpoint)
        return {}

    @torch.no_grad()
    def rank(self, part, file):
        """Write each instance's target and its rank among all items, ties against it, to FILE.npz."""
        self.model.eval()
        started, ranks, targets = time.perf_counter(), [], []
        for interaction, _, rows, positives in self.parts[part]:
            assert torch.equal(rows, torch.arange(len(interaction)))
            scores = self.model.full_sort_predict(interaction.to(self.trainer.device)).view(len(interaction), -1)
            scores[:, 0] = -torch.inf  # padding is no item
            own = scores.gather(1, positives[:, None])
            ranks.append((scores >= own).sum(1).numpy())
            targets.append(positives.numpy())
        tokens = self.train.dataset.id2token("item_id", np.concatenate(targets)).astype(np.int64)
        np.savez(file, rank=np.concatenate(ranks), target=tokens)
        return {"seconds": time.perf_counter() - started}

    def evaluate(self, part):
        """Return what RecBole's own evaluator says, as fractions."""
        started = time.perf_counter()
        result = self.trainer.evaluate(self.parts[part], load_best_model=False)
        return {"metrics": dict(result), "seconds": time.perf_counter() - started}


def main():
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what RecBole prints is none
    sys.argv = sys.argv[:1]  # it reads them as settings
    peer = Peer()
    for line in sys.stdin:
        request = json.loads(line)
        reply = getattr(peer, request.pop("do"))(**request)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
