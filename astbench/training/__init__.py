"""What every task trains with: the LightningModule, optimizer options, sample order, seeds, averaging, sharding."""
