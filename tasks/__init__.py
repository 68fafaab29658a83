"""Problems: one module each, with a LightningModule whose training step is plain backpropagation, and its data."""
