"""What the subcommands of ``cwfast`` do, one module each; ``cwfast.cli`` reads their arguments."""
