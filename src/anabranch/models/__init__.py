"""Networks that several families share: small enough to train on a laptop."""
