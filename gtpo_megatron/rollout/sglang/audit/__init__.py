"""What servers hold and answer, compared with the trainer."""
