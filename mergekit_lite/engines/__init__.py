"""Where a result is computed: in this process, or by tasks on a cluster."""
