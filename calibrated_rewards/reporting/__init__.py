"""What the page of a report is made of: markup that escapes, what an experiment's directory holds, a file a section."""
