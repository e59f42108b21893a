"""What a training needs beside the update: its data, optimizer, folder, log and checkpoints."""
