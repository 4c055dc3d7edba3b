"""What the live jobs need beside Python, on one machine: a Kafka broker, Beam's KafkaIO, Prism, a pool of Python
workers."""
