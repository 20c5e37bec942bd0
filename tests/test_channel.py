"""A link between two jobs brings each packet once and in order, whatever happens to the network or to either end."""

from __future__ import annotations

import shutil
import socket
import time
from pathlib import Path
from queue import Queue
from random import Random
from typing import Any

import pytest
from channels import SECONDS, SIZE, Ends, Sending, Stranger, Waiting, ends, hello, packet, part, take, until
from ranks import free_port

from llm_local.files import Unwritten
from llm_local.jobs.hello import TRAINING
from llm_local.jobs.key import tls
from llm_local.jobs.packet_log import DamagedLog, PacketLog
from llm_local.jobs.segment import record_bytes
from llm_local.jobs.ways import Address, Dial, Door
from llm_local.peer import LostPeer

__all__ = ["ends"]  # a fixture
QUICK = {"silence_seconds": 2.0}


class TestOneLife:
    def test_packets_come_in_order_and_as_they_were_sent(self, ends: Ends):
        sender, receiver = ends.sender(), ends.receiver()
        sending = Sending(sender, 0, 200)
        take(receiver, 0, 200)
        sending.join()
        assert (receiver.taken, sender.num_connections, receiver.num_connections) == (200, 1, 1)
        until(lambda: sender.neighbour == {"stage": 1} and receiver.neighbour == {"stage": 0}, "a beat")

    def test_packets_of_all_sizes(self, ends: Ends):
        sender, receiver = ends.sender(), ends.receiver()
        sizes = [0, 1, 1 << 14, (1 << 14) + 1, 1 << 20]
        for size in sizes:
            sender.send(packet(size, size))
        for size in sizes:
            found = receiver.take()
            assert found is not None
            assert found.numpy().tobytes() == packet(size, size)
            assert found.data_ptr() % 64 == 0  # as torch lets tensors start

    def test_any_order_of_starts(self, ends: Ends):
        sender = ends.sender()
        sending = Sending(sender, 0, 10)
        until(lambda: sender.trouble, "trouble")
        assert "Connection refused" in sender.trouble
        take(ends.receiver(), 0, 10)
        sending.join()
        until(lambda: not sender.trouble, "peace")

    def test_packets_both_ways(self, ends: Ends, tmp_path: Path):
        """As a shared head's matrix goes back."""
        back = PacketLog(tmp_path / "back", 0, None)
        sender, receiver = ends.sender(window=2), ends.receiver(log=back)
        sending, returning = Sending(sender, 0, 60), Sending(receiver, 0, 20)
        for number in range(20):
            take(receiver, 3 * number, 3 * number + 3)
            take(sender, number, number + 1)
        sending.join()
        returning.join()

    @pytest.mark.parametrize("window", [1, 4])
    def test_no_more_than_the_window_waits_unread(self, ends: Ends, window: int):
        sender, receiver = ends.sender(log=(1 << 20, None)), ends.receiver(window=window)
        Sending(sender, 0, 20).join()
        for number in range(20 - window):
            until(lambda: receiver.ready.qsize() >= window, "a full window")
            time.sleep(0.01)
            assert receiver.ready.qsize() == window
            take(receiver, number, number + 1)

    def test_a_full_log_makes_the_sender_wait_until_the_receiver_has_saved(self, ends: Ends, capfd):
        room = 8 * record_bytes(SIZE)
        sender, receiver = ends.sender(log=(room, 0)), ends.receiver(window=100)
        sending = Sending(sender, 0, 24)
        for saved in (0, 8, 16):
            take(receiver, saved, saved + 8)
            until(lambda saved=saved: sending.sent == saved + 8, "a full log")
            time.sleep(0.05)
            assert (sending.sent, ends.log.num_bytes) == (saved + 8, room)
            receiver.made_durable(saved + 8)
        sending.join()
        until(lambda: ends.log.num_bytes == 0, "an empty log")

    def test_it_says_that_the_log_is_full(self, ends: Ends, capfd):
        sender, receiver = ends.sender(log=(record_bytes(SIZE), 0)), ends.receiver()
        sending = Sending(sender, 0, 2)
        take(receiver, 0, 1)
        said = ""

        def is_said() -> bool:
            nonlocal said
            said += capfd.readouterr().err
            return "llm_local: link 0→1, replica 0: the log is full; this stage waits until stage 1 has saved\n" in said

        until(is_said, "said")
        receiver.made_durable(1)
        sending.join()


class TestABrokenConnection:
    @pytest.mark.processes
    @pytest.mark.parametrize("seed", range(3))
    def test_loses_nothing_and_doubles_nothing(self, ends: Ends, seed: int):
        relay, random = ends.relay(), Random(seed)
        sender, receiver = ends.sender(port=relay.port), ends.receiver()
        sending = Sending(sender, 0, 400)
        cuts = sorted(random.sample(range(400), 6))
        for start, stop in zip([0, *cuts], [*cuts, 400], strict=True):
            take(receiver, start, stop)
            if random.random() < 0.5:
                receiver.made_durable(stop)
            relay.reset()
        sending.join()
        assert sender.num_connections > 3

    @pytest.mark.processes
    def test_that_nobody_has_closed_is_given_up_after_a_silence(self, ends: Ends):
        relay = ends.relay()
        sender, receiver = ends.sender(port=relay.port, **QUICK), ends.receiver(**QUICK)
        sending = Sending(sender, 0, 60)
        take(receiver, 0, 20)
        relay.is_black_hole = True
        until(lambda: "no sign of life for 2 s" in sender.trouble, "a silence")
        relay.is_black_hole = False
        take(receiver, 20, 60)
        sending.join()
        assert receiver.num_connections > 1

    @pytest.mark.processes
    def test_that_is_slow_is_none(self, ends: Ends):
        relay = ends.relay()
        relay.bytes_at_a_time, relay.pause = 1000, 0.005  # a packet takes longer than there is silence
        sender, receiver = ends.sender(port=relay.port, **QUICK), ends.receiver(**QUICK)
        whole = packet(0, 800_000)
        sender.send(whole)
        found = receiver.take()
        assert found is not None
        assert found.numpy().tobytes() == whole
        assert sender.num_connections == 1

    def test_a_receiver_whose_connection_went_without_a_sign_takes_the_next_one(self, ends: Ends):
        """The sender is told by its system that the connection is broken, the receiver isn't."""
        relay = ends.relay()
        sender, receiver = ends.sender(port=relay.port), ends.receiver()
        sending = Sending(sender, 0, 100, pause=0.002)
        take(receiver, 0, 20)
        pairs, relay._pairs = relay._pairs, []
        for one, _ in pairs:
            one.shutdown(socket.SHUT_RDWR)
        take(receiver, 20, 100)
        sending.join()
        assert receiver.num_connections > 1


class TestLives:
    def test_a_receiver_gets_again_what_its_checkpoint_does_not_hold(self, ends: Ends):
        sender = ends.sender()
        sending, saved = Sending(sender, 0, 120), 0
        for number in (30, 50, 110):
            receiver = ends.receiver(first=saved)
            take(receiver, saved, number)
            if number == 30:
                receiver.made_durable(saved := 15)
                until(lambda: ends.log.durable == 15, "trimmed")
            receiver.close()
        take(ends.receiver(first=saved), saved, 120)
        sending.join()

    def test_a_sender_makes_its_packets_again_and_the_receiver_gets_each_once(self, ends: Ends):
        receiver, taken = ends.receiver(), 0
        for start, stop in ((0, 40), (25, 60), (60, 90), (70, 120)):
            sender = ends.sender(start_at=start)
            sending = Sending(sender, start, stop)
            take(receiver, taken, stop)
            taken = stop
            receiver.made_durable(start)
            sending.join()
            ends.log.persist(stop)
            sender.close()

    @pytest.mark.processes
    @pytest.mark.parametrize("seed", range(3))
    def test_both_ends_come_and_go(self, ends: Ends, seed: int):
        """At random, each back to its own last checkpoint, over a connection that breaks."""
        random, relay = Random(seed), ends.relay()
        sent = saved = 0  # what the ends' checkpoints hold
        sender, receiver = ends.sender(port=relay.port), ends.receiver()
        sending, taken = Sending(sender, 0, 300), 0
        while taken < 300:
            stop = min(300, taken + random.randrange(1, 40))
            take(receiver, taken, stop)
            taken = stop
            event = random.choice(["cut", "save", "sender saves", "receiver dies", "sender dies"])
            if event == "cut":
                relay.reset()
            elif event == "save":
                receiver.made_durable(saved := random.randint(saved, taken))
            elif event == "sender saves":
                sent = sending.sent
                ends.log.persist(sent)
            elif event == "receiver dies":
                receiver.close()
                receiver, taken = ends.receiver(first=saved), saved
            else:
                sending.stop()
                sender.close()
                sender = ends.sender(start_at=sent, port=relay.port)
                sending = Sending(sender, sent, 300)
        sending.join()

    def test_both_go_back_to_a_step_before_one_that_was_durable(self, ends: Ends):
        sender, receiver = ends.sender(), ends.receiver()
        Sending(sender, 0, 30).join()
        take(receiver, 0, 30)
        receiver.made_durable(20)
        until(lambda: ends.log.durable == 20, "trimmed")
        ends.log.persist(30)
        sender.close()
        receiver.close()
        sender, receiver = ends.sender(start_at=10), ends.receiver(first=10)
        sending = Sending(sender, 10, 40)
        take(receiver, 10, 40)
        sending.join()

    def test_packets_that_are_gone_end_the_one_that_comes(self, ends: Ends):
        sender, receiver = ends.sender(), ends.receiver()
        Sending(sender, 0, 30).join()
        take(receiver, 0, 30)
        receiver.made_durable(20)
        until(lambda: ends.log.durable == 20, "trimmed")
        receiver.close()
        again = ends.receiver(first=10)
        with pytest.raises(LostPeer, match="stage 1 goes on from packet 10, and stage 0 has none before 20"):
            again.take()
        again.close()
        take(ends.receiver(first=20), 20, 30)  # the sender has gone on

    def test_a_damaged_log_ends_the_sender(self, ends: Ends):
        sender = ends.sender(log=(0, None))
        Sending(sender, 0, 10).join()
        for path in ends.log.folder.glob("*.packets"):
            path.write_bytes(b"\0" * path.stat().st_size)
        ends.receiver()
        with pytest.raises(DamagedLog, match="does not have packet"):
            until(lambda: sender.check(), "damaged")

    def test_a_log_that_cannot_be_trimmed_ends_the_sender(self, ends: Ends):
        """And is not a thread's alone."""
        sender, receiver = ends.sender(), ends.receiver()
        Sending(sender, 0, 3).join()
        take(receiver, 0, 3)
        shutil.rmtree(ends.log.folder)
        receiver.made_durable(2)
        with pytest.raises(Unwritten, match="could not be written"):
            until(lambda: sender.check(), "unwritten")


class TestAbsence:
    @pytest.mark.parametrize("is_sender", [True, False])
    def test_longer_than_allowed_ends_the_other_one(self, ends: Ends, is_sender: bool):
        channel = ends.sender(absent_seconds=0.5) if is_sender else ends.receiver(absent_seconds=0.5)
        other = 1 if is_sender else 0
        said = rf"link 0→1, replica 0: stage {other} is away for 0\.5 s \(--absent_peer_timeout 0\.5\)"
        with pytest.raises(LostPeer, match=said):
            until(lambda: channel.check(), "missed") if is_sender else channel.take()

    @pytest.mark.processes
    def test_a_full_log_and_the_end_are_no_longer_waited_for(self, ends: Ends):
        sender = ends.sender(absent_seconds=0.5, log=(record_bytes(SIZE), 0))
        sender.send(packet(0))
        for wait in (lambda: sender.send(packet(1)), sender.await_finish):
            with pytest.raises(LostPeer, match="stage 1 is away"):
                wait()
        receiver = ends.receiver(absent_seconds=0.5)
        sender.close()
        with pytest.raises(LostPeer, match="stage 0 is away"):
            receiver.finish()

    def test_that_ends_in_time_is_none(self, ends: Ends):
        receiver = ends.receiver(absent_seconds=30)
        for start in (0, 10):
            sender = ends.sender(start_at=start)
            Sending(sender, start, start + 10).join()
            take(receiver, start, start + 10)
            ends.log.persist(start + 10)
            sender.close()


class TestTheEnd:
    @pytest.mark.parametrize("sender_waits_first", [True, False])
    def test_both_know(self, ends: Ends, sender_waits_first: bool):
        sender, receiver = ends.sender(window=1), ends.receiver()
        Sending(sender, 0, 5).join()
        take(receiver, 0, 5)
        first, second = (sender.await_finish, receiver.finish)[:: 1 if sender_waits_first else -1]
        waiting = Waiting(first)
        time.sleep(0.2)
        second()
        waiting.join()
        assert ends.news == ["finished"]
        part(sender, receiver)
        assert sender.take() is None

    def test_a_receiver_to_whom_a_last_word_was_lost_hears_it_again(self, ends: Ends):
        """The sender has written the end down, and would have gone."""
        relay = ends.relay()
        sender, receiver = ends.sender(port=relay.port), ends.receiver()
        sender.send(packet(0))
        take(receiver, 0, 1)
        relay.loses = True
        waiting = Waiting(receiver.finish)
        sender.await_finish()
        parting = Waiting(lambda: part(sender))
        time.sleep(0.5)
        relay.loses = False
        relay.reset()
        waiting.join()
        part(receiver)
        parting.join()
        assert sender.num_connections == 2

    def test_a_receiver_stays_until_its_matrices_are_saved(self, ends: Ends, tmp_path: Path):
        """The stage before may go back after the last one has finished, and want them again."""
        back = PacketLog(tmp_path / "back", 1 << 20, None)
        sender, receiver = ends.sender(window=2), ends.receiver(log=back)
        sender.send(packet(0))
        take(receiver, 0, 1)
        Sending(receiver, 0, 3).join()
        waiting = Waiting(receiver.finish)
        until(lambda: ends.news, "finished")
        take(sender, 0, 2)
        sender.close()
        again = ends.sender(start_at=0, window=2, first=1)
        again.knew()
        again.send(packet(0))
        take(again, 1, 3)
        assert waiting.is_alive()
        again.made_durable(3)
        waiting.join()

    def test_packets_that_nobody_wants_any_more_fill_no_log(self, ends: Ends):
        room = 2 * record_bytes(SIZE)
        sender = ends.sender(log=(room, 0))
        sender.knew()
        Sending(sender, 0, 20).join()
        assert (ends.log.next, ends.log.num_bytes) == (20, 0)

    def test_a_receiver_that_comes_back_finishes_again(self, ends: Ends):
        """As it was killed before it knew that it is known."""
        sender, receiver = ends.sender(), ends.receiver()
        sender.send(packet(0))
        take(receiver, 0, 1)
        receiver.made_durable(1)
        waiting = Waiting(sender.await_finish)
        receiver.is_finished = True
        receiver.wake()
        until(lambda: ends.news, "finished")
        receiver.close()
        again = ends.receiver(first=1)
        again.finish()
        waiting.join()
        part(sender, again)
        assert ends.news == ["finished"]

    def test_a_sender_that_comes_back_knows_and_lets_the_receiver_go(self, ends: Ends):
        sender, receiver = ends.sender(), ends.receiver()
        sender.send(packet(0))
        take(receiver, 0, 1)
        sender.close()
        waiting = Waiting(receiver.finish)
        again = ends.sender(start_at=1)
        again.knew()
        again.await_finish()
        waiting.join()
        part(again, receiver)
        assert ends.news == []

    def test_a_word_that_is_due_while_hands_are_shaken_is_said(self, ends: Ends, monkeypatch: pytest.MonkeyPatch):
        """The sender has said hello without it, and comes to know it before it has an answer."""
        sender, receiver = ends.sender(), ends.receiver()
        sender.send(packet(0))
        take(receiver, 0, 1)
        sender.close()
        waiting, lives, dialled = Waiting(receiver.finish), Queue(), Dial.connection

        def connection(way: Dial, *given: Any) -> Any:
            found = dialled(way, *given)
            lives.get(timeout=SECONDS).knew()
            return found

        monkeypatch.setattr(Dial, "connection", connection)
        again = ends.sender(start_at=1)
        lives.put(again)
        waiting.join()
        part(again, receiver)


class TestAnotherPeer:
    def test_while_one_is_there_is_refused_and_that_one_goes_on(self, ends: Ends):
        """Two jobs of one stage, each with an output folder of its own."""
        sender, receiver = ends.sender(), ends.receiver()
        sending = Sending(sender, 0, 40)
        take(receiver, 0, 20)
        second = ends.sender(folder="second log", says={"place": "another machine"})
        with pytest.raises(LostPeer, match=r"stage 0 is there already: stage 0, replica 0 \(stage 0's machine\)"):
            until(lambda: second.check(), "refused")
        second.close()
        take(receiver, 20, 40)
        sending.join()
        assert receiver.num_connections == 1

    @pytest.mark.parametrize(
        ("says", "reason"),
        [
            ({"stage": 2}, "stage 1, replica 0 waits for stage 0 here, not for stage 2, replica 0 (stage 0's machine)"),
            ({"replica": 1}, "waits for stage 0 here, not for stage 0, replica 1"),
            ({"fingerprint": {"seed": 8}}, "seed differs: 8 in stage 0, 7 in stage 1; start both alike"),
            ({"run": "01d"}, "stage 0 is of another run (01d, stage 1 of 5eed)"),
        ],
    )
    def test_that_does_not_belong_here_ends_and_the_one_that_trains_waits_for_the_right_one(
        self, ends: Ends, says: dict, reason: str
    ):
        receiver = ends.receiver(says={"standing": TRAINING})
        wrong = ends.sender(says=says, folder="wrong log")
        with pytest.raises(LostPeer) as caught:
            until(lambda: wrong.check(), "refused")
        assert reason in str(caught.value)
        wrong.close()
        until(lambda: reason in receiver.trouble, "trouble")
        sending = Sending(ends.sender(), 0, 5)
        take(receiver, 0, 5)
        sending.join()

    def test_of_two_that_have_just_come_both_end(self, ends: Ends):
        receiver, sender = ends.receiver(), ends.sender(says={"fingerprint": {"seed": 8}})
        for channel in (sender, receiver):
            with pytest.raises(LostPeer, match="seed differs: 8 in stage 0, 7 in stage 1"):
                until(lambda channel=channel: channel.check(), "refused")


@pytest.mark.processes
def test_a_port_that_another_has(ends: Ends):
    port = free_port()
    with socket.create_server(("127.0.0.1", port)), pytest.raises(OSError, match="Address already in use"):
        Door(Address("127.0.0.1", port), tls(ends.key, server=True))


def test_a_closed_door_leaves_its_port_and_nobody_behind_it(ends: Ends):
    """A job asks the stage before what it knows, and listens again."""
    for _ in range(20):
        door = Door(Address("127.0.0.1", ends.port), tls(ends.key, server=True))
        guest = Stranger(ends.port, ends.key)
        guest.say(hello(0, wants=0).to_bytes())
        door.close()
        assert guest.is_sent_away()
        with socket.create_server(("127.0.0.1", ends.port)):
            pass
