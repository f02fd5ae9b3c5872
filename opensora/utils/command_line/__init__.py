"""What every command does alike: options, errors of one line, exit codes."""
