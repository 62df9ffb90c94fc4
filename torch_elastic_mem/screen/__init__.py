"""What a broker's state looks like to a person: values in, texts and pictures out. No I/O, no clock."""
