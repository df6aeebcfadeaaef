"""The Gradio page. Data flows one way: form -> settings -> job -> events -> page. Never imports torch."""
