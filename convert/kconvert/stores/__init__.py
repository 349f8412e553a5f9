"""Checkpoints in object stores: s3://, gs:// and az:// by way of obstore (the extra `cloud`)."""
