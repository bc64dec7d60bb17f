"""Long Range Arena: five classifications of long sequences."""
