"""The console command ``ebft`` and its subcommands. Everything else is imported once a command needs it."""
