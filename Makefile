# make demo    steps 1 to 7 on the bundled miniature; resumes where it stopped, then shows the results
# make test    all tests, in two processes (TEST_PROCESSES=4: in four); make test-fast: the unit tests that are quick
# make check   lint, formatting, types
# make clean   delete the results of the demo, after asking
PYTHON ?= .venv/bin/python
PYTHON3 ?= python3
PROFILE ?= mini
TEST_PROCESSES ?= 2
RUN := $(basename $(notdir $(PROFILE)))
WORK_DIR ?= $(CURDIR)/runs/$(RUN)
export PROFILE WORK_DIR

STEPS := step1_train_tokenizer.py step2_merge_tokenizer.py step3_resize_model.py step4_test_zero.py \
	step5_train_pt_single_gpu.py step6_train_sft_single_gpu.py step7_eval_chat.py
SOURCES := constants.py pipeline.py $(STEPS) llmtuner mini tests benchmarks

.PHONY: demo test test-fast check format clean

.venv/installed: requirements.txt
	$(PYTHON3) -c 'import llmtuner'
	$(PYTHON3) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
	touch $@

demo: .venv/installed
	@for step in $(STEPS); do \
		printf '\n\033[1m$$ %s %s\033[0m\n' "$(PYTHON)" "$$step"; \
		SKIP_COMPLETED=1 $(PYTHON) "$$step" </dev/null || exit $$?; \
	done

# A file's tests run in one process, for they share what is slow to make; the files of steps, which take longest, come first.
PYTEST := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder

test: .venv/installed
	$(PYTEST)

test-fast: .venv/installed
	$(PYTEST) -m "not slow and not distributed and not browser" tests/unit

check: .venv/installed
	$(PYTHON) -m ruff check $(SOURCES)
	$(PYTHON) -m ruff format --check $(SOURCES)
	$(PYTHON) -m mypy

format: .venv/installed
	$(PYTHON) -m ruff check --fix $(SOURCES)
	$(PYTHON) -m ruff format $(SOURCES)

# Only what `make demo` makes by default, and only after a yes: WORK_DIR may be any directory.
clean:
	@case "$(PROFILE)" in mini|chatglm3-6b|*.yaml|*.yml) name="$(RUN)";; *) name=;; esac; \
	case "$$name" in ""|.*|*[!A-Za-z0-9._-]*) echo "error: PROFILE=$(PROFILE) is unknown." >&2; exit 2;; esac; \
	if [ "$(WORK_DIR)" != "$(CURDIR)/runs/$(RUN)" ]; then \
		echo "error: make clean deletes only runs/$(RUN), not WORK_DIR=$(WORK_DIR). Delete that by hand." >&2; exit 2; \
	fi; \
	[ -e "runs/$(RUN)" ] || { echo "runs/$(RUN) does not exist: there is nothing to delete."; exit 0; }; \
	printf 'Delete runs/%s and everything in it? [y/N] ' "$(RUN)"; \
	read -r answer || answer=; \
	case "$$answer" in y|Y|yes) rm -rf "runs/$(RUN)";; *) echo "Nothing was deleted."; exit 2;; esac
