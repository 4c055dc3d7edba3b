"""Everything that the live jobs need besides Python, on one machine: a Kafka broker, Beam's KafkaIO, Prism, a pool of
Python workers."""
