"""Models that lie elsewhere, read in parts where they lie: over HTTP, from S3, from the Hub."""
