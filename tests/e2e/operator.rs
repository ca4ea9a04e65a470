//! An operator changes a volume while clients use it: replicas come, go and are copied anew, and it grows.

use crate::cluster::Cluster;
use crate::fio::Verifying;
use crate::plan::Plan;
use crate::scratch;
use crate::seed;

fn plan() -> Plan {
    Plan { size: 48 << 20, lag_bytes_max: 64 << 20, journal_size: 128 << 20, ..Plan::default() }
}

#[test]
fn replicas_are_added_removed_and_copied_anew_under_a_client() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("operator::replicas_are_added_removed_and_copied_anew_under_a_client");
    let mut cluster = Cluster::serving(plan());
    let fio = Verifying::start(&cluster, rng.fork());
    let refused = cluster.replica_remove("x").expect_err("there is no x");
    assert!(refused.contains("exit status: 1") && refused.contains("replica x"), "{refused}");

    cluster.another_agent("d");
    cluster.replica_add("d").expect("an order to add d");
    assert_eq!(cluster.status().view, ["a", "b", "c", "d"]);
    let refused = cluster.replica_add("d").expect_err("it is there already");
    assert!(refused.contains("remedy"), "{refused}");
    fio.is_well();

    cluster.replica_resync("b", &["--full"]).expect("an order to copy all of b anew");
    fio.is_well();
    cluster.replica_remove("d").expect("an order to remove d");
    fio.is_well();

    // Another one at another place takes a's part.
    cluster.another_agent("e");
    cluster.replica_replace("a", "e").expect("an order to put e in the place of a");
    for gone in ["a", "d"] {
        cluster.agent_mut(gone).stop();
        cluster.agents.retain(|agent| agent.name != gone);
    }
    fio.finish();
    assert_eq!(cluster.status().view, ["b", "c", "e"]);
    for words in [
        ["a: ", "removed from the volume"],
        ["d: ", "removed from the volume"],
        ["b: ", "what it lacks is copied"],
        ["b: ", "an operator asked"],
    ] {
        cluster.assert_event(&words);
    }
    cluster.assert_event(&["the view is", "b, c, e"]);
    cluster.end_well();

    // The config names those that there are now; another engine finds them so.
    cluster.write_config();
    cluster.start_agents();
    cluster.start_engine();
    assert_eq!(cluster.status().view, ["b", "c", "e"]);
    cluster.end_well();
}

#[test]
fn a_volume_grows_under_a_client() {
    let _turn = scratch::shared_machine();
    let (_, mut rng) = seed::of_test("operator::a_volume_grows_under_a_client");
    let mut cluster = Cluster::serving(plan());
    let (before, after) = (cluster.plan.size, cluster.plan.size + (80 << 20));
    let fio = Verifying::start(&cluster, rng.fork());
    let refused = cluster.resize(before - 4096).expect_err("a volume does not shrink");
    assert!(refused.contains("remedy"), "{refused}");
    cluster.resize(after).expect("an order to grow");
    assert_eq!(cluster.status().size, after);
    let mut client = cluster.connect();
    assert_eq!(client.size, after, "a new connection sees the new size");
    client.write(after - 4096, &[9; 4096], 0).expect("a write at the new end");
    assert_eq!(client.read(before, 4096).expect("a read"), [0; 4096], "what is new is zero");
    client.disconnect();
    fio.finish();
    cluster.assert_event(&["the volume has", &after.to_string()]);
    let image = cluster.end_well();
    assert_eq!(image.len() as u64, after, "the images have grown");
    assert!(image[after as usize - 4096..].iter().all(|byte| *byte == 9));

    cluster.plan.size = after;
    cluster.write_config();
    cluster.start_agents();
    cluster.start_engine();
    assert_eq!(cluster.connect().size, after);
    cluster.end_well();
}
