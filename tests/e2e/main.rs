//! End-to-end tests: the real `nbdcast` and `listener-agent` programs, real NBD clients, real signals, real disks.
//!
//! The first group of modules is what the stories need: places, programs, clusters, an NBD client, a writer that
//! remembers what it was promised. The second group is the stories, one file for each thing that the product claims.
//! Nothing here looks inside the product: only the command line, the config files, NBD and the admin address are used.
//!
//! Environment: `NBDCAST_TEST_SEED` replays one seed, `NBDCAST_TEST_QUICK=1` runs a tenth of the random rounds,
//! `NBDCAST_TEST_LONG=1` lets some stories go on for minutes, `NBDCAST_TEST_KEEP=1` leaves the test directories behind.

mod cluster;
mod endings;
mod fio;
mod ledger;
mod nbd;
mod orders;
mod plan;
mod program;
mod proxy;
mod scratch;
mod scrub;
mod seed;
mod served;
mod status;
mod tools;
mod writer;

mod activation;
mod bounds;
mod clients;
mod crash;
mod damage;
mod disks;
mod durability;
mod errors;
mod flood;
mod nbd_tls;
mod negative;
mod operator;
mod policies;
mod powercut;
mod recovery;
mod repair;
mod replicas;
mod resent;
mod resync;
mod sparse;
mod stall;
mod takeover;
mod tls;
mod wraps;
