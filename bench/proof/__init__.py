"""Random healthy models through the gates of export/proof: a gate that one of them does not hold is a false alarm."""
