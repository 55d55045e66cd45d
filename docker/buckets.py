"""Create buckets in the S3-compatible store at AWS_ENDPOINT_URL; existing ones stay as they are."""

import sys

import boto3

s3 = boto3.client("s3", region_name="us-east-1")
present = {bucket["Name"] for bucket in s3.list_buckets()["Buckets"]}
for name in sys.argv[1:]:
    if name not in present:
        s3.create_bucket(Bucket=name)
    print(f"bucket {name}: {'was there' if name in present else 'made'}")
