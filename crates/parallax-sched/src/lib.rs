//! Which layers run on which machine, and which machines serve which request.
