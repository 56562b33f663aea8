"""What every part of the package uses: settings, files, text for terminals."""
