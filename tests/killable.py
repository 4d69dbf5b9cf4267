"""What runs in processes of their own in the tests of resuming, some of which are killed."""

import resource

from cmoe_hf.conversion import Tuning, convert, recover, resume, sweep
from cmoe_hf.conversion.work import WorkFolder


def convert_it(begun, arguments):
    """Say that it begins, then convert."""
    begun.set()
    convert(**arguments)


def hold(begun, output):
    """Be at work in a folder until killed."""
    with WorkFolder.create(output, {}, overwrite=False):
        begun.set()
        while True:
            begun.wait(1)


def run_out_of_space(queue, arguments, layer):
    """Convert under a quota that the shard of a layer exceeds; report what is raised."""
    write = WorkFolder.write_layer

    def write_under_quota(self, index, *others):
        if index == layer:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        write(self, index, *others)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

    WorkFolder.write_layer = write_under_quota
    try:
        convert(**arguments)
    except Exception as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        queue.put((type(error).__name__, str(error), getattr(error, "__notes__", [])))


def resume_it(begun, output):
    """Say that it begins, then go on."""
    begun.set()
    resume(output)


def recover_it(arguments, tuning):
    """Recover until killed."""
    recover(**arguments, tuning=Tuning(**tuning))


def sweep_it(arguments):
    """Sweep until killed."""
    sweep(**arguments)
